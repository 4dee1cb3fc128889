# SPDX-License-Identifier: MIT
"""Lion: one state, and steps of the same size for every element."""

from .optimizer import Optimizer1State

__all__ = ["Lion", "Lion8bit", "Lion32bit", "PagedLion", "PagedLion8bit", "PagedLion32bit"]


class Lion(Optimizer1State):
    """Lion (Chen et al. 2023, arXiv:2302.06675). Weight decay is decoupled.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float or a 0-dim tensor.
        betas: Weight of the momentum in the step, and its decay rate.
        weight_decay: Weight decay.
        optim_bits: 8 or 32: bits per element of the state.
        args: Object whose attributes replace the settings, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        is_paged: Keep large states in memory that can move to the host.
        percentile_clipping: Accepted for programs of bitsandbytes 0.49 and older; 100: off.
        block_wise: Accepted for programs of bitsandbytes 0.49 and older.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = Lion(layer.parameters(), lr=1e-4, optim_bits=8)
    """

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
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
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
            is_paged=is_paged,
        )


class Lion8bit(Lion):
    """Lion with 8-bit blockwise state: one byte per element and one float per 256 of them.

    The arguments of :class:`Lion` without `optim_bits`.
    """

    state_bits = 8

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args=None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ):
        super().__init__(
            params,
            lr,
            betas,
            weight_decay,
            self.state_bits,
            args,
            min_8bit_size,
            is_paged,
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
        )


class Lion32bit(Lion8bit):
    """Lion with 32-bit state. The arguments of :class:`Lion` without `optim_bits`."""

    state_bits = 32


class PagedLion(Lion):
    """Lion that asks for paged memory. Same arguments as :class:`Lion`."""

    always_paged = True


class PagedLion8bit(Lion8bit):
    """Lion8bit that asks for paged memory. Same arguments as :class:`Lion8bit`."""

    always_paged = True


class PagedLion32bit(Lion32bit):
    """Lion32bit that asks for paged memory. Same arguments as :class:`Lion32bit`."""

    always_paged = True
