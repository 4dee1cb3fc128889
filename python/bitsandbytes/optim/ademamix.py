# SPDX-License-Identifier: MIT
"""AdEMAMix: Adam with a second, slower average of the gradients."""

import math

import torch
from torch import Tensor

from .optimizer import Optimizer2State

__all__ = [
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
]


class AdEMAMix(Optimizer2State):
    """AdEMAMix (Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137). Decoupled weight decay.

    ``state["state1"]`` is of shape ``(2, *parameter.shape)``: the fast and the slow average;
    ``state["state2"]`` is the average of squares.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        betas: Decay rates of the fast average, of the squares, and of the slow average.
        alpha: Weight of the slow average.
        t_alpha: Steps in which `alpha` grows from 0 to its value; None: at once.
        t_beta3: Steps in which the third beta grows from the first to its value; None: at once.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        optim_bits: 8 or 32: bits per element of the states.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        is_paged: Keep large states in memory that can move to the host.
        percentile_clipping: Scale a gradient whose norm exceeds this percentile of the last
            hundred norms of its parameter down to it; 100: never.
        block_wise: Must be True: 8-bit states are scaled by blocks of 256.
        stochastic_rounding: Round new bfloat16 parameters up or down at random, such that the
            expected value is exact. Other dtypes round to nearest.
        rounding_seed: Seed of that rounding.

    Raises:
        ValueError: A setting is out of its range, or there are not three betas.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = AdEMAMix(layer.parameters(), lr=1e-3, t_alpha=1000, t_beta3=1000)
    """

    state_rows = (2, 1)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        if not block_wise:
            raise ValueError(f"{type(self).__name__}: block_wise must be True, got {block_wise}")
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            None,
            min_8bit_size,
            percentile_clipping,
            is_paged=is_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        betas = param_group.get("betas", self.defaults["betas"])
        if len(betas) != 3:
            raise ValueError(f"{type(self).__name__}: betas must be three numbers, got {betas}")
        super().add_param_group(param_group)


class AdEMAMix8bit(AdEMAMix, without=("optim_bits",)):
    """AdEMAMix with 8-bit blockwise states. The arguments of :class:`AdEMAMix` but `optim_bits`."""

    state_bits = 8


class AdEMAMix32bit(AdEMAMix, without=("optim_bits",)):
    """AdEMAMix with 32-bit states. The arguments of :class:`AdEMAMix` but `optim_bits`."""

    state_bits = 32


class PagedAdEMAMix(AdEMAMix, without=("is_paged",)):
    """AdEMAMix that asks for paged memory. The arguments of :class:`AdEMAMix` but `is_paged`."""

    always_paged = True


class PagedAdEMAMix8bit(AdEMAMix8bit, without=("is_paged",)):
    """AdEMAMix8bit that asks for paged memory, and takes no `is_paged`."""

    always_paged = True


class PagedAdEMAMix32bit(AdEMAMix32bit, without=("is_paged",)):
    """AdEMAMix32bit that asks for paged memory, and takes no `is_paged`."""

    always_paged = True


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix in plain PyTorch, one parameter at a time, as programs' tests compare with.

    The number of the step is kept in the groups; weight decay is part of the update:
    ``p -= lr * (update + weight_decay * p)``.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "t_beta3": t_beta3,
                "t_alpha": t_alpha,
            },
        )

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            beta1, beta2, beta3 = group["betas"]
            alpha = group["alpha"]
            if group["t_alpha"]:
                alpha = min(step * alpha / group["t_alpha"], alpha)
            if group["t_beta3"]:
                s = step / group["t_beta3"]
                log1, log3 = math.log(beta1), math.log(beta3)
                grown = math.exp(log1 * log3 / ((1 - s) * log3 + s * log1)) if s < 1 else beta3
                beta3 = min(grown, beta3)
            c1, c2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                if not state:
                    state["m1_m2"] = p.new_zeros((2, *p.shape))
                    state["nu"] = torch.zeros_like(p)
                m1, m2 = state["m1_m2"]
                nu = state["nu"]
                m1.lerp_(g, 1 - beta1)
                m2.lerp_(g, 1 - beta3)
                nu.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                update = (m1 / c1 + alpha * m2) / (nu.sqrt() / c2 + group["eps"])
                p.add_(update + group["weight_decay"] * p, alpha=-group["lr"])
        return loss
