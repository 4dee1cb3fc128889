# SPDX-License-Identifier: MIT
"""AdamW: Adam with a weight decay of 1e-2 by default."""

from .adam import Adam

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]


class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).

    The rule of :class:`Adam`, whose weight decay is decoupled already; only the default of
    `weight_decay` differs. See there for the arguments.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = AdamW(layer.parameters(), lr=1e-3, weight_decay=0.1)
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
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
            eps,
            weight_decay,
            amsgrad,
            optim_bits,
            args,
            min_8bit_size,
            is_paged,
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
        )


class AdamW8bit(AdamW):
    """AdamW with 8-bit blockwise states. Same arguments as :class:`AdamW`."""

    state_bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit states whatever `optim_bits` says. Same arguments as :class:`AdamW`."""

    state_bits = 32


class PagedAdamW(AdamW):
    """AdamW that asks for paged memory. Same arguments as :class:`AdamW`."""

    always_paged = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit that asks for paged memory. Same arguments as :class:`AdamW8bit`."""

    always_paged = True


class PagedAdamW32bit(AdamW32bit):
    """AdamW32bit that asks for paged memory. Same arguments as :class:`AdamW32bit`."""

    always_paged = True
