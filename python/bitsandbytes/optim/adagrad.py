# SPDX-License-Identifier: MIT
"""Adagrad: gradients over the root of the sum of their squares."""

from torch import Tensor

from .optimizer import Optimizer1State

__all__ = ["Adagrad", "Adagrad8bit", "Adagrad32bit"]


class Adagrad(Optimizer1State):
    """Adagrad (Duchi, Hazan & Singer 2011). Weight decay is added to the gradient.

    Args:
        params: Parameters or parameter groups; float32, float16 or bfloat16 on any device.
        lr: Learning rate; a float, or a 0-dim tensor, which may lie on the parameters' device.
        lr_decay: Must be 0.
        weight_decay: Weight decay.
        initial_accumulator_value: Must be 0.
        eps: Added to the denominator.
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
        ValueError: A setting is out of its range.

    Example:
        >>> layer = torch.nn.Linear(64, 64)
        >>> optimizer = Adagrad(layer.parameters(), lr=1e-2, optim_bits=8)
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
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
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
    ):
        name = type(self).__name__
        for argument, value in (
            ("lr_decay", lr_decay),
            ("initial_accumulator_value", initial_accumulator_value),
        ):
            if value != 0:
                raise ValueError(f"{name}: {argument} must be 0, got {value}")
        if self.state_bits == 8 and optim_bits != 8:
            raise ValueError(f"{name}: optim_bits must be 8, got {optim_bits}")
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
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


class Adagrad8bit(Adagrad, defaults={"optim_bits": 8}):
    """Adagrad with 8-bit state. Same arguments as :class:`Adagrad`, `optim_bits` must be 8."""

    state_bits = 8


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit state whatever `optim_bits` says. Same arguments as :class:`Adagrad`."""

    state_bits = 32
