# SPDX-License-Identifier: MIT
"""LARS: momentum whose update of a tensor is bounded by the norm of that tensor."""

import torch
from torch import Tensor

from . import sharding
from .optimizer import Optimizer1State, warn_ignored

__all__ = ["LARS", "LARS8bit", "LARS32bit", "PytorchLARS"]


class LARS(Optimizer1State):
    """LARS (You, Gitman & Ginsburg 2017, arXiv:1708.03888) with a bound in place of a ratio.

    The update of :class:`SGD`, scaled down to ``max_unorm`` times the norm of the parameter where
    it is larger. Weight decay is added to the gradient.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        momentum: Decay rate of the momentum; must not be zero, there would be no state.
        dampening: Not implemented: warns when it is not zero, as bitsandbytes always ignored it.
        weight_decay: Weight decay.
        nesterov: Not implemented: warns when True, as bitsandbytes always ignored it.
        optim_bits: 8 or 32: bits per element of the state.
        args: Object whose attributes replace the settings, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        max_unorm: Bound on the norm of an update over the learning rate, relative to the norm of
            the parameter; 0: none. A parameter of zeros is not bounded.
        percentile_clipping: Scale a gradient whose norm exceeds this percentile of the last
            hundred norms of its parameter down to it; 100: never.
        block_wise: Scale 8-bit states by blocks of 256; otherwise by whole tensors.
        stochastic_rounding: Round new bfloat16 parameters up or down at random, such that the
            expected value is exact. Other dtypes round to nearest.
        rounding_seed: Seed of that rounding.

    Raises:
        NotImplementedError: `momentum` is zero.
        ValueError: Another setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = LARS(layer.parameters(), lr=1e-2, momentum=0.9, optim_bits=8)
    """

    def __init__(
        self,
        params,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        if momentum == 0:
            raise NotImplementedError(
                f"{type(self).__name__}: momentum must not be zero; use PytorchLARS"
            )
        warn_ignored(self, dampening=dampening, nesterov=nesterov)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            max_unorm=max_unorm,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class LARS8bit(LARS, without=("optim_bits",)):
    """LARS with 8-bit state. The arguments of :class:`LARS` without `optim_bits`."""

    state_bits = 8


class LARS32bit(LARS, without=("optim_bits",)):
    """LARS with 32-bit state. The arguments of :class:`LARS` without `optim_bits`."""

    state_bits = 32


class PytorchLARS(torch.optim.Optimizer):
    """LARS in plain PyTorch, one parameter at a time, with dampening and Nesterov momentum.

    Args:
        params: Parameters or parameter groups, in any floating-point dtype.
        lr: Learning rate.
        momentum: Decay rate of the momentum; 0: none.
        dampening: What a gradient loses before it enters the momentum.
        weight_decay: Weight decay, added to the gradient.
        nesterov: Look ahead by one step of the momentum.
        max_unorm: Bound on the norm of an update over the learning rate, relative to the norm of
            the parameter; 0: none.

    Raises:
        ValueError: A setting is out of its range, or Nesterov momentum is asked for without
            momentum or with dampening.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = PytorchLARS(layer.parameters(), lr=1e-2, momentum=0.9, nesterov=True)
    """

    def __init__(
        self,
        params,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ):
        for argument, value in (
            ("lr", lr),
            ("momentum", momentum),
            ("weight_decay", weight_decay),
            ("max_unorm", max_unorm),
        ):
            if not value >= 0.0:
                raise ValueError(f"PytorchLARS: {argument} must be zero or positive, got {value}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                "PytorchLARS: nesterov must go with momentum and without dampening, got "
                f"momentum {momentum} and dampening {dampening}"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "max_unorm": max_unorm,
            },
        )

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step with the gradients at hand.

        Args:
            closure: Recomputes and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(map(sharding.is_flattened, group["params"])):
                sharding.refuse_bounds(group)
            if any(p.grad is not None and p.grad.layout != torch.strided for p in group["params"]):
                raise RuntimeError("PytorchLARS.step: gradients must be dense, got a sparse one")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = self._direction(group, p)
                    p.add_(update * self._bound(group["max_unorm"], p, update) * -group["lr"])
        return loss

    def _direction(self, group: dict, p: Tensor) -> Tensor:
        momentum = group["momentum"]
        direction = p.grad
        if group["weight_decay"] != 0:
            direction = direction.add(p, alpha=group["weight_decay"])
        if momentum == 0:
            return direction
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = direction.clone()
        else:
            buffer = state["momentum_buffer"].mul_(momentum)
            buffer.add_(direction, alpha=1 - group["dampening"])
        buffer = state["momentum_buffer"]
        return direction.add(buffer, alpha=momentum) if group["nesterov"] else buffer

    @staticmethod
    def _bound(max_unorm: float, p: Tensor, update: Tensor) -> Tensor | float:
        if max_unorm <= 0.0:
            return 1.0
        dtype = torch.promote_types(p.dtype, torch.float32)
        bound = max_unorm * torch.linalg.vector_norm(p, dtype=dtype)
        norm = torch.linalg.vector_norm(update, dtype=dtype)
        # On the device: a comparison in Python would wait for it.
        return torch.where((bound > 0) & (norm > bound), bound / norm, 1.0).to(update.dtype)
