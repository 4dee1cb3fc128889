# SPDX-License-Identifier: MIT
"""AdamW: Adam with a weight decay of 1e-2 by default."""

from .adam import Adam

__all__ = ["AdamW", "AdamW8bit", "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]


class AdamW(Adam, defaults={"weight_decay": 1e-2}):
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101).

    The rule of :class:`Adam`, whose weight decay is decoupled already; only the default of
    `weight_decay` differs. See there for the arguments.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = AdamW(layer.parameters(), lr=1e-3, weight_decay=0.1)
    """


class AdamW8bit(AdamW):
    """AdamW with 8-bit blockwise states. Same arguments as :class:`AdamW`."""

    state_bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit states whatever `optim_bits` says. Same arguments as :class:`AdamW`."""

    state_bits = 32


class PagedAdamW(AdamW, without=("is_paged",)):
    """AdamW that asks for paged memory. The arguments of :class:`AdamW` without `is_paged`."""

    always_paged = True


class PagedAdamW8bit(AdamW8bit, without=("is_paged",)):
    """AdamW8bit that asks for paged memory, and takes no `is_paged`."""

    always_paged = True


class PagedAdamW32bit(AdamW32bit, without=("is_paged",)):
    """AdamW32bit that asks for paged memory, and takes no `is_paged`."""

    always_paged = True
