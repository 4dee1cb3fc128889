# SPDX-License-Identifier: MIT
"""LAMB: Adam whose update of a tensor is bounded by the norm of that tensor."""

from torch import Tensor

from .optimizer import Optimizer2State, warn_ignored

__all__ = ["LAMB", "LAMB8bit", "LAMB32bit"]


class LAMB(Optimizer2State):
    """LAMB (You et al. 2019, arXiv:1904.00962) with a bound in place of a ratio.

    The update of :class:`Adam`, scaled down to ``max_unorm`` times the norm of the parameter where
    it is larger; never scaled up. Weight decay is decoupled, and not part of the norm.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        bias_correction: Averages are always corrected: warns when False.
        betas: Decay rates of the first and second moment.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        amsgrad: Not implemented: warns when True, as bitsandbytes always ignored it.
        adam_w_mode: Weight decay is always decoupled: warns when False.
        optim_bits: 8 or 32: bits per element of the states.
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
        ValueError: A setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = LAMB(layer.parameters(), lr=1e-3, optim_bits=8)
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        if self.state_bits == 8 and amsgrad:
            raise ValueError(f"{type(self).__name__}: amsgrad must be False, got {amsgrad}")
        warn_ignored(
            self,
            amsgrad=amsgrad,
            bias_correction=not bias_correction,
            adam_w_mode=not adam_w_mode,
        )
        super().__init__(
            "lamb",
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
            max_unorm=max_unorm,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class LAMB8bit(LAMB, without=("optim_bits",)):
    """LAMB with 8-bit states. The arguments of :class:`LAMB` without `optim_bits`."""

    state_bits = 8


class LAMB32bit(LAMB, without=("optim_bits",)):
    """LAMB with 32-bit states. The arguments of :class:`LAMB` without `optim_bits`."""

    state_bits = 32
