# SPDX-License-Identifier: MIT
"""Stochastic gradient descent with momentum."""

from torch import Tensor

from .optimizer import Optimizer1State, warn_ignored

__all__ = ["SGD", "SGD8bit", "SGD32bit"]


class SGD(Optimizer1State):
    """SGD with momentum. Weight decay is added to the gradient.

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
        >>> optimizer = SGD(layer.parameters(), lr=1e-2, momentum=0.9, optim_bits=8)
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
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        if momentum == 0:
            raise NotImplementedError(
                f"{type(self).__name__}: momentum must not be zero; use torch.optim.SGD"
            )
        warn_ignored(self, dampening=dampening, nesterov=nesterov)
        super().__init__(
            "momentum",
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
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
        )


class SGD8bit(SGD, without=("optim_bits",)):
    """SGD with 8-bit momentum. The arguments of :class:`SGD` without `optim_bits`."""

    state_bits = 8


class SGD32bit(SGD, without=("optim_bits",)):
    """SGD with 32-bit momentum. The arguments of :class:`SGD` without `optim_bits`."""

    state_bits = 32
