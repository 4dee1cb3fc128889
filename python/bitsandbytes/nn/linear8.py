# SPDX-License-Identifier: MIT
"""The linear layer of LLM.int8()."""

from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.matmul import MatmulLtState, matmul
from .module8 import Module8bit
from .params import Int8Params, cast_bias, own_tensor

__all__ = ["Linear8bitLt"]


class Linear8bitLt(Module8bit, nn.Linear):
    """Linear layer with an int8 weight and int8 products: LLM.int8().

    The layer starts with a floating-point weight, so that a checkpoint can be loaded into it, and
    becomes int8 when it is moved to a device (also to the CPU). Source: Dettmers et al. 2022,
    https://arxiv.org/abs/2208.07339.

    The state dict of a quantized layer holds the codes as ``weight``, their float32 statistics
    ``SCB`` ``[output_features]`` and ``weight_format``. It loads into a quantized layer, at any
    time. A floating-point checkpoint loads into both kinds of layer; a quantized one quantizes it.

    Args:
        input_features: Length of an input vector.
        output_features: Length of an output vector.
        bias: Whether the layer has a bias.
        has_fp16_weights: Whether the weight stays in floating point, is trained, and is quantized
            again for every forward in training.
        threshold: Magnitude from which an activation is an outlier, whose column is multiplied in
            floating point; 0 for none. The paper uses 6.0.
        index: Kept as the attribute `index`; no effect.
        device: Where the parameters are created.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0)
        >>> layer.load_state_dict(linear.state_dict())
        <All keys matched successfully>
        >>> layer = layer.to("cpu").eval()
        >>> layer.weight.dtype
        torch.int8
        >>> layer(torch.ones(1, 64)).shape
        torch.Size([1, 32])
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0 and not has_fp16_weights
        self.index = index
        self.weight = Int8Params(
            self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights
        )

    def _shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product of `x` ``[..., input_features]`` in the dtype of `x`."""
        state = self.state
        state.is_training = self.training
        weight, bias = own_tensor(self, "weight"), own_tensor(self, "bias")
        self._sync_state(weight)
        if bias is not None and bias.dtype != x.dtype:
            cast_bias(self, bias, x.dtype)
        out = matmul(x, weight, bias=bias, state=state)
        if not state.has_fp16_weights and weight.dtype != torch.int8:
            weight.data = state.CB
        return out

    def init_8bit_state(self) -> None:
        """Moves the codes and statistics of the parameter into :attr:`state`."""
        self.state.CB = self.weight.CB
        # A parameter that was moved by hand after a forward has left its statistics behind.
        if self.weight.SCB is not None:
            self.state.SCB = self.weight.SCB
        self.weight.CB = self.weight.SCB = None

    def _sync_state(self, weight: Tensor) -> None:
        """Makes the state that of the present weight, which other code may have replaced."""
        state = self.state
        in_int8 = weight.dtype == torch.int8
        if getattr(weight, "CB", None) is not None:
            self.init_8bit_state()
        elif in_int8:
            if getattr(weight, "SCB", None) is not None:
                state.CB, state.SCB, weight.SCB = weight.data, weight.SCB, None
        elif not state.has_fp16_weights and state.CB is not None:
            state.reset_grads()
        if in_int8 and state.SCB is None:
            raise RuntimeError(
                "Linear8bitLt: the weight is int8 but its statistics (SCB) are missing: load a "
                "checkpoint that holds SCB, or assign an Int8Params made with SCB"
            )
