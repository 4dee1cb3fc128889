# SPDX-License-Identifier: MIT
"""Bases of optimizers with one and with two states: arguments, and how states are laid out."""

from collections import abc
from typing import Any

import torch
from torch import Tensor

from .._checks import warn_user
from ..plain.states import BLOCK
from ..quant.codes import default_code
from . import sharding
from .engine import Optimizer8bit
from .overrides import GlobalOptimManager

__all__ = [
    "GlobalOptimManager",
    "MockArgs",
    "Optimizer1State",
    "Optimizer2State",
    "Optimizer8bit",
    "warn_ignored",
]


class MockArgs:
    """A bag of attributes, filled from a dictionary."""

    def __init__(self, initial_data: dict[str, Any]):
        for key, value in initial_data.items():
            setattr(self, key, value)


def warn_ignored(optimizer: torch.optim.Optimizer, **given: Any) -> None:
    """Warns about arguments that exist for compatibility and were given a value that asks for more.

    Args:
        optimizer: The optimizer under construction.
        given: Name of the argument -> whether it asks for something.
    """
    names = " and ".join(name for name, asks in given.items() if asks)
    if names:
        warn_user(f"{type(optimizer).__name__}: {names} is not implemented and ignored")


class _StateOptimizer(Optimizer8bit):
    """What optimizers with one and with two states share: checks, `args`, the state's layout."""

    def __init__(
        self,
        optimizer_name: str,
        params,
        lr,
        betas,
        eps: float,
        weight_decay: float,
        optim_bits: int,
        args,
        min_8bit_size: int,
        percentile_clipping: int,
        block_wise: bool,
        max_unorm: float,
        skip_zeros: bool,
        is_paged: bool,
        stochastic_rounding: bool,
        rounding_seed: int,
        extra_defaults: dict[str, Any] | None = None,
    ):
        name = type(self).__name__
        # `not >=` also refuses NaN.
        for argument, value in (
            ("lr", lr),
            ("eps", eps),
            ("weight_decay", weight_decay),
            ("max_unorm", max_unorm),
        ):
            if not value >= 0.0:
                raise ValueError(f"{name}: {argument} must be zero or positive, got {value}")
        if not isinstance(betas, abc.Sized) or len(betas) < 2:
            raise ValueError(f"{name}: betas must be at least two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: betas[{i}] must lie in [0, 1), got {beta}")
        optim_bits = self.state_bits or optim_bits
        if optim_bits not in (8, 32):
            raise ValueError(f"{name}: optim_bits must be 8 or 32, got {optim_bits}")
        if not 0 <= percentile_clipping <= 100:
            raise ValueError(
                f"{name}: percentile_clipping must lie in [0, 100], got {percentile_clipping}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if stochastic_rounding:
            # In the groups, where checkpoints keep it.
            defaults["rounding_seed"] = rounding_seed
        super().__init__(params, {**defaults, **(extra_defaults or {})}, optim_bits, is_paged)
        self.optimizer_name = optimizer_name
        self.args = args or MockArgs(
            {
                "optim_bits": optim_bits,
                "min_8bit_size": min_8bit_size,
                "max_unorm": max_unorm,
                "skip_zeros": skip_zeros,
                "percentile_clipping": percentile_clipping,
                "block_wise": block_wise,
            }
        )
        if optim_bits == 8:
            self.fill_qmap()

    @torch.no_grad()
    def init_state(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Creates zero states for `p`: 8-bit codes from `min_8bit_size` elements on.

        Args:
            group: The parameter group.
            p: The parameter.
            gindex: Index of the group.
            pindex: Index of the parameter in the group.
        """
        config = self.get_config(gindex, pindex, group)
        if config["optim_bits"] not in (8, 32):
            raise ValueError(
                f"{type(self).__name__}: optim_bits must be 8 or 32, got {config['optim_bits']}"
            )
        eight_bit = config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"]
        if eight_bit and not config["block_wise"] and max(self.state_rows) > 1:
            raise ValueError(f"{type(self).__name__}: block_wise must be True, got False")
        dtype = torch.uint8 if eight_bit else torch.float32
        state = self._state[p]
        state["step"] = 0
        part = sharding.local(p)
        maps = list(zip((1, 2), self.state_rows, ("dynamic", "udynamic"), strict=False))
        for i, rows, qmap in maps:
            state[f"state{i}"] = self.get_state_buffer(part, dtype, *([rows] if rows > 1 else []))
            if eight_bit:
                self.name2qmap[qmap] = state[f"qmap{i}"] = default_code(qmap, p.device)
        state.update(sharding.attached(p, state, self.state_rows))
        if not eight_bit:
            return
        blocks = -(-part.numel() // BLOCK)
        for i, rows, _ in maps:
            scales = {f"absmax{i}": (blocks,) if rows == 1 else (rows, blocks)}
            if not config["block_wise"]:
                scales = {f"max{i}": (1,), f"new_max{i}": (1,)}
            for key, shape in scales.items():
                state[key] = torch.zeros(shape, dtype=torch.float32, device=p.device)


class Optimizer2State(_StateOptimizer):
    """Base of optimizers that keep two numbers per element, such as Adam.

    Args:
        optimizer_name: Name of the update rule.
        params: Parameters or parameter groups.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        betas: Decay rates of the states, or their text such as ``"(0.9, 0.95)"``.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        optim_bits: 8 or 32: bits per element of the states.
        args: Object whose attributes replace the settings below, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        percentile_clipping: Scale a gradient whose norm exceeds this percentile of the last
            hundred norms of its parameter down to it; 100: never.
        block_wise: Scale 8-bit states by blocks of 256; otherwise by whole tensors.
        max_unorm: Bound on the norm of an update relative to its parameter's; 0: none.
        skip_zeros: Leave elements alone whose gradient is zero.
        is_paged: Keep large states in memory that can move to the host.
        alpha: Weight of the slow average (AdEMAMix).
        t_alpha: Steps until `alpha` is reached.
        t_beta3: Steps until the third beta is reached.
        stochastic_rounding: Round new bfloat16 parameters up or down at random, such that the
            expected value is exact; small updates are then not lost. Other dtypes round to
            nearest.
        rounding_seed: Seed of that rounding. It is part of the parameter groups, and so of
            checkpoints.

    Raises:
        ValueError: A setting is out of its range.
    """

    state_rows = (1, 1)

    def __init__(
        self,
        optimizer_name: str,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, ...] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        *,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        if isinstance(betas, str):
            betas = [float(beta) for beta in betas.strip("()[] ").split(",")]
        # Only AdEMAMix has these in its groups: `type(opt)(params, **opt.defaults)` makes another
        # optimizer of Adam and the like.
        schedules = {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        super().__init__(
            optimizer_name,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            max_unorm,
            skip_zeros,
            is_paged,
            stochastic_rounding,
            rounding_seed,
            schedules if any(schedules.values()) or max(self.state_rows) > 1 else None,
        )


class Optimizer1State(_StateOptimizer):
    """Base of optimizers that keep one number per element, such as SGD with momentum.

    The arguments are those of :class:`Optimizer2State` without `alpha`, `t_alpha` and `t_beta3`.
    """

    state_rows = (1,)

    def __init__(
        self,
        optimizer_name: str,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        *,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        if not isinstance(betas, abc.Sequence) or isinstance(betas, str):
            raise TypeError(f"{type(self).__name__}: betas must be a sequence of floats")
        super().__init__(
            optimizer_name,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            max_unorm,
            skip_zeros,
            is_paged,
            stochastic_rounding,
            rounding_seed,
        )
