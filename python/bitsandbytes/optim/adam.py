# SPDX-License-Identifier: MIT
"""Adam with decoupled weight decay, in 32-bit and 8-bit precision of the states."""

from torch import Tensor

from .analysis import AnalysisAdam
from .optimizer import Optimizer2State, warn_ignored

__all__ = [
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AnalysisAdam",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
]


class Adam(Optimizer2State):
    """Adam (Kingma & Ba 2014, arXiv:1412.6980).

    Weight decay is decoupled, as in AdamW: the parameter shrinks by ``lr * weight_decay`` after
    its update.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        amsgrad: Not implemented: warns when True, as bitsandbytes always ignored it.
        optim_bits: 8 or 32: bits per element of the states.
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
        >>> optimizer = Adam(layer.parameters(), lr=1e-3, optim_bits=8)
        >>> layer(torch.randn(2, 64)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
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
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        name = type(self).__name__
        if self.state_bits == 8:
            if amsgrad:
                raise ValueError(f"{name}: amsgrad must be False, got {amsgrad}")
            if optim_bits not in (8, 32):
                raise ValueError(f"{name}: optim_bits must be 8 or left alone, got {optim_bits}")
        warn_ignored(self, amsgrad=amsgrad)
        super().__init__(
            "adam",
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
            is_paged=is_paged,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
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
