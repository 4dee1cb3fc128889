# SPDX-License-Identifier: MIT
"""Linear layers for int8 training: SwitchBack."""

import torch
from torch import Tensor, nn

from ..autograd.switchback import quantize_rows, quantize_tensor, quantized_product, switchback

__all__ = [
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
]


class SwitchBackLinear(nn.Linear):
    """Linear layer that trains with int8 products forward and for the gradient of its input.

    The weight stays in floating point and is quantized in every forward. Source: Wortsman et al.
    2023, https://arxiv.org/abs/2304.13013.

    Args:
        in_features: Length of an input vector.
        out_features: Length of an output vector.
        bias: Whether the layer has a bias.
        device: Where the parameters are created.
        dtype: Their dtype.
        vector_wise_quantization: Whether each row of the weight has a scale of its own.
        mem_efficient: Whether int8 codes are kept for the backward pass instead of activations. Not
            with `vector_wise_quantization`.

    Raises:
        ValueError: If both options are set.

    Example:
        >>> layer = SwitchBackLinear(64, 32)
        >>> layer(torch.ones(2, 64)).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([32, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool = False,
        mem_efficient: bool = False,
    ):
        if vector_wise_quantization and mem_efficient:
            raise ValueError(
                "SwitchBackLinear: mem_efficient must be False with vector_wise_quantization, "
                "got True"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.vector_wise_quantization = vector_wise_quantization
        self.mem_efficient = mem_efficient

    def prepare_for_eval(self) -> None:
        """Replaces the weight by int8 codes, the buffers `W_int8` and `state_W`.

        `state_W` holds the statistic of every row, or one for the tensor. From then on the layer
        can only be evaluated.
        """
        quantize = quantize_rows if self.vector_wise_quantization else quantize_tensor
        codes, stats = quantize(self.weight.detach())
        self.register_buffer("W_int8", codes)
        self.register_buffer("state_W", stats if self.vector_wise_quantization else stats[:1])
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product of `x` ``[..., in_features]`` in the dtype of `x`."""
        if "W_int8" in self._buffers:
            stats = self.state_W.expand(self.out_features).contiguous()
            return quantized_product(x, self.W_int8, stats, self.bias)
        return switchback(
            x, self.weight, self.bias, self.vector_wise_quantization, self.mem_efficient
        )


class SwitchBackLinearGlobal(SwitchBackLinear):
    """:class:`SwitchBackLinear` with one scale for the weight."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)


class SwitchBackLinearGlobalMemEfficient(SwitchBackLinear):
    """:class:`SwitchBackLinear` that keeps int8 codes for the backward pass."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype, mem_efficient=True)


class SwitchBackLinearVectorwise(SwitchBackLinear):
    """:class:`SwitchBackLinear` with a scale for each row of the weight."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__(
            in_features, out_features, bias, device, dtype, vector_wise_quantization=True
        )


class StandardLinear(nn.Linear):
    """What :class:`torch.nn.Linear` is, under the name that SwitchBack is compared with."""
