# SPDX-License-Identifier: MIT
"""Adam with decoupled weight decay, in 32-bit and 8-bit precision of the states."""

import warnings

from .optimizer import Optimizer2State

__all__ = ["Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit"]


class Adam(Optimizer2State):
    """Adam (Kingma & Ba 2014, arXiv:1412.6980).

    Weight decay is decoupled, as in AdamW: the parameter shrinks by ``lr * weight_decay`` after
    its update.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float or a 0-dim tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        amsgrad: Not implemented: warns when True, as bitsandbytes always ignored it.
        optim_bits: 8 or 32: bits per element of the states.
        args: Object whose attributes replace the settings, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        is_paged: Keep large states in memory that can move to the host.
        percentile_clipping: Accepted for programs of bitsandbytes 0.49 and older; 100: off.
        block_wise: Accepted for programs of bitsandbytes 0.49 and older.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = Adam(layer.parameters(), lr=1e-3, optim_bits=8)
        >>> layer(torch.randn(2, 64)).sum().backward()
        >>> optimizer.step()
    """

    state_bits: int | None = None  # None: as `optim_bits` says

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ):
        name = type(self).__name__
        if self.state_bits == 8:
            if amsgrad:
                raise ValueError(f"{name}: amsgrad must be False, got {amsgrad}")
            if optim_bits not in (8, 32):
                raise ValueError(f"{name}: optim_bits must be 8 or left alone, got {optim_bits}")
        elif amsgrad:
            warnings.warn(f"{name}: amsgrad is not implemented and ignored", stacklevel=2)
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            self.state_bits or optim_bits,
            args,
            min_8bit_size,
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
            is_paged=is_paged,
        )


class Adam8bit(Adam):
    """Adam with 8-bit blockwise states (Dettmers et al. 2022, arXiv:2110.02861).

    A quarter of the memory for states: two bytes per element and one float per 256 of them.
    Same arguments as :class:`Adam`.
    """

    state_bits = 8


class Adam32bit(Adam):
    """Adam with 32-bit states whatever `optim_bits` says. Same arguments as :class:`Adam`."""

    state_bits = 32


class PagedAdam(Adam):
    """Adam that asks for paged memory. Same arguments as :class:`Adam`."""

    always_paged = True


class PagedAdam8bit(Adam8bit):
    """Adam8bit that asks for paged memory. Same arguments as :class:`Adam8bit`."""

    always_paged = True


class PagedAdam32bit(Adam32bit):
    """Adam32bit that asks for paged memory. Same arguments as :class:`Adam32bit`."""

    always_paged = True
