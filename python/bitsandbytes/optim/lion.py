# SPDX-License-Identifier: MIT
"""Lion: one state, and steps of the same size for every element."""

from torch import Tensor

from .optimizer import Optimizer1State

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]


class Lion(Optimizer1State):
    """Lion (Chen et al. 2023, arXiv:2302.06675). Weight decay is decoupled.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        betas: Weight of the momentum in the step, and its decay rate.
        weight_decay: Weight decay.
        optim_bits: 8 or 32: bits per element of the state.
        args: Object whose attributes replace the settings, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        is_paged: Keep large states in memory that can move to the host.
        percentile_clipping: Scale a gradient whose norm exceeds this percentile of the last
            hundred norms of its parameter down to it; 100: never.
        block_wise: Scale 8-bit states by blocks of 256; otherwise by whole tensors.
        stochastic_rounding: Round new bfloat16 parameters up or down at random, such that the
            expected value is exact. Other dtypes round to nearest.
        rounding_seed: Seed of that rounding.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = Lion(layer.parameters(), lr=1e-4, optim_bits=8)
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            is_paged=is_paged,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class Lion8bit(Lion, without=("optim_bits",)):
    """Lion with 8-bit state. The arguments of :class:`Lion` without `optim_bits`."""

    state_bits = 8


class Lion32bit(Lion, without=("optim_bits",)):
    """Lion with 32-bit state. The arguments of :class:`Lion` without `optim_bits`."""

    state_bits = 32


class PagedLion(Lion, without=("is_paged",)):
    """Lion that asks for paged memory. The arguments of :class:`Lion` without `is_paged`."""

    always_paged = True


class PagedLion8bit(Lion8bit, without=("is_paged",)):
    """Lion8bit that asks for paged memory, and takes no `is_paged`."""

    always_paged = True


class PagedLion32bit(Lion32bit, without=("is_paged",)):
    """Lion32bit that asks for paged memory, and takes no `is_paged`."""

    always_paged = True
