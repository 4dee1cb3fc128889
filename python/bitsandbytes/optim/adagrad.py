# SPDX-License-Identifier: MIT
"""Adagrad: gradients over the root of the sum of their squares."""

from .optimizer import Optimizer1State

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


class Adagrad(Optimizer1State):
    """Adagrad (Duchi, Hazan & Singer 2011). Weight decay is added to the gradient.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float or a 0-dim tensor.
        lr_decay: Must be 0.
        weight_decay: Weight decay.
        initial_accumulator_value: Must be 0.
        eps: Added to the denominator.
        optim_bits: 8 or 32: bits per element of the state.
        args: Object whose attributes replace the settings, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        percentile_clipping: Accepted for programs of bitsandbytes 0.49 and older; 100: off.
        block_wise: Accepted for programs of bitsandbytes 0.49 and older.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = Adagrad(layer.parameters(), lr=1e-2, optim_bits=8)
    """

    state_bits: int | None = None  # None: as `optim_bits` says

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ):
        name = type(self).__name__
        for argument, value in (
            ("lr_decay", lr_decay),
            ("initial_accumulator_value", initial_accumulator_value),
        ):
            if value != 0:
                raise ValueError(f"{name}: {argument} must be 0, got {value}")
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            self.state_bits or optim_bits,
            args,
            min_8bit_size,
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
        )


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit blockwise state. Same arguments as :class:`Adagrad`, `optim_bits` 8."""

    state_bits = 8

    def __init__(
        self,
        params,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args=None,
        min_8bit_size: int = 4096,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ):
        if optim_bits != 8:
            raise ValueError(f"{type(self).__name__}: optim_bits must be 8, got {optim_bits}")
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping=percentile_clipping,
            block_wise=block_wise,
        )


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit state whatever `optim_bits` says. Same arguments as :class:`Adagrad`."""

    state_bits = 32
