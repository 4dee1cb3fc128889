# SPDX-License-Identifier: MIT
"""Optimizer steps in plain PyTorch, for devices without a native kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional
from torch import Tensor

from .._checks import FLOATS, check, check_device, check_dtype, check_numel
from .._ops import register_kernel
from .quantize import LEVELS, dequantize_blocks, quantize_blocks

__all__ = ["BLOCK", "RULES", "Decay", "Hyper", "Rule"]

# Elements that share one absmax in 8-bit states; fixed by the checkpoint format.
BLOCK = 256


class Hyper(NamedTuple):
    """Hyperparameters of one call, in the order of the ops."""

    lr: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    gnorm_scale: float
    skip_zeros: bool


class Decay(Enum):
    """Where weight decay enters."""

    L2 = "added to the gradient"
    BEFORE = "the parameter shrinks before its update"
    AFTER = "the parameter shrinks after its update"


@dataclass(frozen=True)
class Rule:
    """An update rule: states per element, weight decay, ``change(grad, states, hyper, step)``.

    `change` advances the float32 `states` in place and returns the change of the parameter,
    learning rate included.
    """

    states: int
    decay: Decay
    change: Callable[[Tensor, list[Tensor], Hyper, int], Tensor]


def _one_minus(beta: float) -> float:
    # As the native rules compute it: both numbers in float32.
    return 1.0 - torch.tensor(beta, dtype=torch.float32).item()


def _adam(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> Tensor:
    m, v = states
    m.mul_(h.beta1).add_(grad * _one_minus(h.beta1))
    v.mul_(h.beta2).add_(grad * grad * _one_minus(h.beta2))
    c1 = 1.0 - h.beta1**step
    c2 = (1.0 - h.beta2**step) ** 0.5
    smallest = torch.finfo(torch.float32).tiny
    return m / (v.clamp(min=smallest).sqrt() + h.eps * c2) * (-h.lr * c2 / c1)


def _lion(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> Tensor:
    (m,) = states
    direction = torch.sign(m * h.beta1 + grad * _one_minus(h.beta1))
    m.mul_(h.beta2).add_(grad * _one_minus(h.beta2))
    return direction.nan_to_num(0.0) * -h.lr


def _momentum(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> Tensor:
    (m,) = states
    m.mul_(h.beta1 if step > 1 else 0.0).add_(grad)
    return m * -h.lr


def _over_root(grad: Tensor, v: Tensor, h: Hyper) -> Tensor:
    smallest = torch.finfo(torch.float32).tiny
    return grad / (v.clamp(min=smallest).sqrt() + h.eps) * -h.lr


def _rmsprop(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> Tensor:
    (v,) = states
    v.mul_(h.beta1).add_(grad * grad * _one_minus(h.beta1))
    return _over_root(grad, v, h)


def _adagrad(grad: Tensor, states: list[Tensor], h: Hyper, step: int) -> Tensor:
    (v,) = states
    v.add_(grad * grad)
    return _over_root(grad, v, h)


RULES = {
    "adam": Rule(states=2, decay=Decay.AFTER, change=_adam),
    "lion": Rule(states=1, decay=Decay.BEFORE, change=_lion),
    "momentum": Rule(states=1, decay=Decay.L2, change=_momentum),
    "rmsprop": Rule(states=1, decay=Decay.L2, change=_rmsprop),
    "adagrad": Rule(states=1, decay=Decay.L2, change=_adagrad),
}


def _find_rule(op: str, name: str) -> Rule:
    check(name in RULES, op, "rule", f"one of {sorted(RULES)}", repr(name))
    return RULES[name]


def _check_lists(op: str, params: list[Tensor], lists: dict[str, tuple[list[Tensor], int]]) -> None:
    check(len(params) > 0, op, "params", "a list of at least one tensor", "an empty list")
    check_dtype(op, "params", params[0], *FLOATS)
    for name, (tensors, expected) in lists.items():
        check(len(tensors) == expected, op, name, f"a list of {expected}", len(tensors))


def _check_step(op: str, params: list[Tensor], step: Tensor, lr_tensor: Tensor | None) -> None:
    for i, param in enumerate(params):
        check_dtype(op, f"params[{i}]", param, params[0].dtype)
        check_device(op, f"params[{i}]", param, "params[0]", params[0])
    check_dtype(op, "step", step, torch.int64)
    check_numel(op, "step", step, 1, "the number of steps")
    if lr_tensor is not None:
        check_dtype(op, "lr_tensor", lr_tensor, torch.float32)
        check_numel(op, "lr_tensor", lr_tensor, 1, "the learning rate")


def _check_members(
    op: str, name: str, tensors: list[Tensor], params: list[Tensor], dtype: torch.dtype
) -> None:
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        where = f"{name}[{i}]"
        check(tensor.layout == torch.strided, op, where, "dense", tensor.layout)
        check_dtype(op, where, tensor, dtype)
        check_numel(op, where, tensor, param.numel(), "as its parameter")
        check_device(op, where, tensor, f"params[{i}]", param)


def _hyper(lr_tensor: Tensor | None, lr: float, *rest) -> Hyper:
    return Hyper(lr if lr_tensor is None else lr_tensor.item(), *rest)


def _advance(
    rule: Rule, param: Tensor, grad: Tensor, states: list[Tensor], h: Hyper, step: int
) -> tuple[Tensor, Tensor]:
    """Advances flat float32 `states` of one tensor; returns the new parameter and the gradient.

    The gradient is scaled, but without weight decay.
    """
    g = grad.reshape(-1).float() * h.gnorm_scale
    p = param.reshape(-1).float()
    before = [s.clone() for s in states] if h.skip_zeros else []
    shrink = 1.0 - h.lr * h.weight_decay
    start = p * shrink if rule.decay is Decay.BEFORE else p
    decayed = g + p * h.weight_decay if rule.decay is Decay.L2 else g
    updated = start + rule.change(decayed, states, h, step)
    if rule.decay is Decay.AFTER:
        updated = updated * shrink
    if h.skip_zeros:
        skip = g == 0
        updated = torch.where(skip, p, updated)
        for state, old in zip(states, before, strict=True):
            state.copy_(torch.where(skip, old, state))
    return updated, g


def _idle_blocks(grad: Tensor) -> Tensor:
    """Blocks of a flat gradient in which every element is zero."""
    padded = torch.nn.functional.pad(grad, (0, -grad.numel() % BLOCK))
    return (padded.view(-1, BLOCK) == 0).all(dim=1)


@register_kernel("optimizer_step_32bit", "default")
@torch.no_grad()
def optimizer_step_32bit(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    step: Tensor,
    lr_tensor: Tensor | None,
    *hyper,
) -> None:
    op = "optimizer_step_32bit"
    found = _find_rule(op, rule)
    count = len(params)
    lists = [state1, state2][: found.states]
    expected = {"grads": (grads, count), "state1": (state1, count)}
    expected["state2"] = (state2, count if found.states == 2 else 0)
    _check_lists(op, params, expected)
    _check_step(op, params, step, lr_tensor)
    _check_members(op, "grads", grads, params, params[0].dtype)
    for name, tensors in zip(("state1", "state2"), lists, strict=False):
        _check_members(op, name, tensors, params, torch.float32)
    h = _hyper(lr_tensor, *hyper)
    number = int(step.item()) + 1
    for i, param in enumerate(params):
        states = [tensors[i] for tensors in lists]
        flat = [state.reshape(-1).clone() for state in states]
        updated, _ = _advance(found, param, grads[i], flat, h, number)
        for state, new in zip(states, flat, strict=True):
            state.copy_(new.view(state.shape))
        param.copy_(updated.view(param.shape))


@register_kernel("optimizer_step_8bit_blockwise", "default")
@torch.no_grad()
def optimizer_step_8bit_blockwise(
    rule: str,
    params: list[Tensor],
    grads: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    absmax1: list[Tensor],
    absmax2: list[Tensor],
    qmap1: Tensor,
    qmap2: Tensor | None,
    step: Tensor,
    lr_tensor: Tensor | None,
    *hyper,
) -> None:
    op = "optimizer_step_8bit_blockwise"
    found = _find_rule(op, rule)
    count = len(params)
    second = count if found.states == 2 else 0
    _check_lists(
        op,
        params,
        {
            "grads": (grads, count),
            "state1": (state1, count),
            "state2": (state2, second),
            "absmax1": (absmax1, count),
            "absmax2": (absmax2, second),
        },
    )
    check(found.states == 1 or qmap2 is not None, op, "qmap2", "given for this rule", None)
    _check_step(op, params, step, lr_tensor)
    _check_members(op, "grads", grads, params, params[0].dtype)
    packs = [(state1, absmax1, qmap1), (state2, absmax2, qmap2)][: found.states]
    for k, (codes, absmax, qmap) in enumerate(packs, 1):
        _check_members(op, f"state{k}", codes, params, torch.uint8)
        check_dtype(op, f"qmap{k}", qmap, torch.float32)
        check_numel(op, f"qmap{k}", qmap, LEVELS, "levels")
        for i, (scales, param) in enumerate(zip(absmax, params, strict=True)):
            check_dtype(op, f"absmax{k}[{i}]", scales, torch.float32)
            blocks = -(-param.numel() // BLOCK)
            check_numel(op, f"absmax{k}[{i}]", scales, blocks, "one per block")
    h = _hyper(lr_tensor, *hyper)
    number = int(step.item()) + 1
    largest = torch.finfo(torch.float32).max
    for i, param in enumerate(params):
        states = [
            dequantize_blocks(codes[i].reshape(-1), absmax[i], qmap, BLOCK)
            for codes, absmax, qmap in packs
        ]
        updated, g = _advance(found, param, grads[i], states, h, number)
        # One bad gradient would spoil the scale of its whole block: that element loses its state
        # and keeps its parameter.
        finite = g.isfinite()
        param.copy_(torch.where(finite, updated, param.reshape(-1).float()).view(param.shape))
        for (codes, absmax, qmap), state in zip(packs, states, strict=True):
            kept = torch.where(finite, state.nan_to_num(0.0, largest, -largest), 0.0)
            new, scales = quantize_blocks(kept, qmap, BLOCK, keep_sign=True)
            if h.skip_zeros:
                # Codes that mean the same numbers again would still lose a little each time.
                idle = _idle_blocks(g)
                scales = torch.where(idle, absmax[i], scales)
                same = idle.repeat_interleave(BLOCK)[: g.numel()]
                new = torch.where(same, codes[i].reshape(-1), new)
            codes[i].copy_(new.view(codes[i].shape))
            absmax[i].copy_(scales)
