# SPDX-License-Identifier: MIT
"""The update rules of the optimizers in plain PyTorch; formulas in docs/numerics.md."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RULES", "Decay", "Hyper", "Rule"]


class Hyper(NamedTuple):
    """Hyperparameters of one call."""

    lr: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    t_alpha: float
    t_beta3: float


class Decay(Enum):
    """Where weight decay enters."""

    L2 = "added to the gradient"
    BEFORE = "the parameter shrinks before its update"
    AFTER = "the parameter shrinks after its update"


@dataclass(frozen=True)
class Rule:
    """An update rule: states per element, weight decay, ``direction(grad, states, hyper, step)``.

    `direction` advances the float32 `states` in place and returns the direction of the step with
    its factor: the parameter moves by ``-lr * factor * direction``.
    """

    states: int
    decay: Decay
    direction: Callable[[Tensor, list[Tensor], Hyper, int], tuple[Tensor, float]]


def _one_minus(beta: float) -> float:
    # As the native rules compute it: both numbers in float32.
    return 1.0 - torch.tensor(beta, dtype=torch.float32).item()


def _average(mean: Tensor, value: Tensor, beta: float) -> None:
    mean.mul_(beta).add_(value * _one_minus(beta))


def _root(v: Tensor) -> Tensor:
    # Never zero, so that eps = 0 leaves elements alone that never had a gradient.
    return v.clamp(min=torch.finfo(torch.float32).tiny).sqrt()


def _adam(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> tuple[Tensor, float]:
    m, v = states
    _average(m, grad, h.beta1)
    _average(v, grad * grad, h.beta2)
    c1 = 1.0 - h.beta1**step
    c2 = math.sqrt(1.0 - h.beta2**step)
    return m / (_root(v) + h.eps * c2), c2 / c1


def _ademamix_schedule(h: Hyper, step: int) -> tuple[float, float]:
    """Returns alpha and beta3 of a step: they grow from 0 and beta1."""
    alpha, beta3 = h.alpha, h.beta3
    if step < h.t_alpha:
        alpha = alpha * step / h.t_alpha
    if step < h.t_beta3:
        s = step / h.t_beta3
        log1, log3 = math.log(h.beta1), math.log(h.beta3)
        beta3 = min(math.exp(log1 * log3 / ((1.0 - s) * log3 + s * log1)), beta3)
    return alpha, beta3


def _ademamix(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> tuple[Tensor, float]:
    fast, slow, v = states
    alpha, beta3 = _ademamix_schedule(h, step)
    _average(fast, grad, h.beta1)
    _average(slow, grad, beta3)
    _average(v, grad * grad, h.beta2)
    c1 = 1.0 - h.beta1**step
    c2 = math.sqrt(1.0 - h.beta2**step)
    return (fast * (1.0 / c1) + slow * alpha) / (_root(v) + h.eps * c2), c2


def _lion(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> tuple[Tensor, float]:
    (m,) = states
    direction = torch.sign(m * h.beta1 + grad * _one_minus(h.beta1))
    _average(m, grad, h.beta2)
    return direction.nan_to_num(0.0), 1.0


def _momentum(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> tuple[Tensor, float]:
    (m,) = states
    m.mul_(h.beta1 if step > 1 else 0.0).add_(grad)
    return m.clone(), 1.0


def _rmsprop(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> tuple[Tensor, float]:
    (v,) = states
    _average(v, grad * grad, h.beta1)
    return grad / (_root(v) + h.eps), 1.0


def _adagrad(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> tuple[Tensor, float]:
    (v,) = states
    v.add_(grad * grad)
    return grad / (_root(v) + h.eps), 1.0


RULES = {
    "adam": Rule(states=2, decay=Decay.AFTER, direction=_adam),
    "lion": Rule(states=1, decay=Decay.BEFORE, direction=_lion),
    "momentum": Rule(states=1, decay=Decay.L2, direction=_momentum),
    "rmsprop": Rule(states=1, decay=Decay.L2, direction=_rmsprop),
    "adagrad": Rule(states=1, decay=Decay.L2, direction=_adagrad),
    "ademamix": Rule(states=3, decay=Decay.AFTER, direction=_ademamix),
}
# Their bound on the update is the caller's.
RULES["lamb"] = RULES["adam"]
RULES["lars"] = RULES["momentum"]
