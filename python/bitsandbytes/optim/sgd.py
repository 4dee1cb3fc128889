# SPDX-License-Identifier: MIT
"""Stochastic gradient descent with momentum."""

import warnings

from .optimizer import Optimizer1State

__all__ = ["SGD", "SGD8bit", "SGD32bit"]


class SGD(Optimizer1State):
    """SGD with momentum. Weight decay is added to the gradient.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float or a 0-dim tensor.
        momentum: Decay rate of the momentum; must not be zero, there would be no state.
        dampening: Not implemented: warns when it is not zero, as bitsandbytes always ignored it.
        weight_decay: Weight decay.
        nesterov: Not implemented: warns when True, as bitsandbytes always ignored it.
        optim_bits: 8 or 32: bits per element of the state.
        args: Object whose attributes replace the settings, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        percentile_clipping: Accepted for programs of bitsandbytes 0.49 and older; 100: off.
        block_wise: Accepted for programs of bitsandbytes 0.49 and older.

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
        lr: float,
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
    ):
        name = type(self).__name__
        if momentum == 0:
            raise NotImplementedError(f"{name}: momentum must not be zero; use torch.optim.SGD")
        for argument, value in (("dampening", dampening), ("nesterov", nesterov)):
            if value:
                warnings.warn(f"{name}: {argument} is not implemented and ignored", stacklevel=2)
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
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
        )


class SGD8bit(SGD):
    """SGD with 8-bit blockwise momentum. The arguments of :class:`SGD` without `optim_bits`."""

    state_bits = 8

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args=None,
        min_8bit_size: int = 4096,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ):
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            self.state_bits,
            args,
            min_8bit_size,
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
        )


class SGD32bit(SGD8bit):
    """SGD with 32-bit momentum. The arguments of :class:`SGD` without `optim_bits`."""

    state_bits = 32
