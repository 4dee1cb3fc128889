# SPDX-License-Identifier: MIT
"""RMSprop: gradients over the root of their running mean square."""

from torch import Tensor

from .optimizer import Optimizer1State, warn_ignored

__all__ = ["RMSprop", "RMSprop8bit", "RMSprop32bit"]


class RMSprop(Optimizer1State):
    """RMSprop (Tieleman & Hinton 2012). Weight decay is added to the gradient.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        alpha: Decay rate of the mean square.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        momentum: Not implemented: warns when it is not zero, as bitsandbytes always ignored it.
        centered: Must be False.
        optim_bits: 8 or 32: bits per element of the state.
        args: Object whose attributes replace the settings, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        percentile_clipping: Scale a gradient whose norm exceeds this percentile of the last
            hundred norms of its parameter down to it; 100: never.
        block_wise: Scale 8-bit states by blocks of 256; otherwise by whole tensors.
        stochastic_rounding: Round new bfloat16 parameters up or down at random, such that the
            expected value is exact. Other dtypes round to nearest.
        rounding_seed: Seed of that rounding.

    Raises:
        NotImplementedError: `alpha` is zero or `centered` is True.
        ValueError: Another setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = RMSprop(layer.parameters(), lr=1e-2, optim_bits=8)
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        name = type(self).__name__
        if alpha == 0:
            raise NotImplementedError(f"{name}: alpha must not be zero")
        if centered:
            raise NotImplementedError(f"{name}: centered must be False, got {centered}")
        warn_ignored(self, momentum=momentum)
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class RMSprop8bit(RMSprop, without=("optim_bits",)):
    """RMSprop with 8-bit state. The arguments of :class:`RMSprop` without `optim_bits`."""

    state_bits = 8


class RMSprop32bit(RMSprop, without=("optim_bits",)):
    """RMSprop with 32-bit state. The arguments of :class:`RMSprop` without `optim_bits`."""

    state_bits = 32
