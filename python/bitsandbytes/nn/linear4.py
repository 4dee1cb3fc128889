# SPDX-License-Identifier: MIT
"""Linear layers with a frozen 4-bit weight, as QLoRA trains on."""

import torch
from torch import Tensor, nn

from .._checks import check
from ..autograd.matmul4 import matmul_4bit
from .module4 import Module4bit, logger
from .params import cast_bias, own_tensor
from .params4 import Params4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]


class Linear4bit(Module4bit, nn.Linear):
    """Linear layer whose weight is packed into 4 bits and frozen.

    The layer starts with a floating-point weight, so that a checkpoint can be loaded into it, and
    is quantized when it is moved to a device (also to the CPU). Gradients flow through it to its
    input and its bias. Source: Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314.

    The state dict of a quantized layer holds the packed codes and their state. It loads into any
    layer of this shape, which is quantized afterwards; a floating-point checkpoint loads as well,
    and is quantized if the layer is. The forward pass never changes the weight.

    Args:
        input_features: Length of an input vector.
        output_features: Length of an output vector.
        bias: Whether the layer has a bias.
        compute_dtype: dtype that the input is cast to and the product is made in. Default: that of
            the first input, if it is float32 or bfloat16; otherwise always that of the input.
        compress_statistics: Quantize the scales as well, to 8 bits (double quantization).
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are held in.
        device: Where the parameters are created.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> linear = torch.nn.Linear(64, 32)
        >>> layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.bfloat16)
        >>> layer.load_state_dict(linear.state_dict())
        <All keys matched successfully>
        >>> layer = layer.to("cpu")
        >>> layer.weight.shape, layer.weight.dtype
        (torch.Size([1024, 1]), torch.uint8)
        >>> layer(torch.ones(2, 64)).shape
        torch.Size([2, 32])
    """

    # Compat: the weight has one layout on every processor.
    support_avx512bf16_for_cpu = False

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state = None
        self.quant_storage = quant_storage

    def _shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    def __setstate__(self, state: dict) -> None:
        """Reads pickled layers, of releases that decided on the compute dtype elsewhere too."""
        super().__setstate__(state)
        self.__dict__.setdefault("compute_type_is_set", self.compute_dtype is not None)

    def set_compute_type(self, x: Tensor) -> None:
        """Fixes the compute dtype by the first input, unless the constructor was given one."""
        self.compute_type_is_set = True
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and not torch.compiler.is_compiling():
            use = "inference." if x.numel() == x.shape[-1] else "inference or training."
            logger.warning(
                "%s: the input is float16 and no compute_dtype was given, so that products are "
                "made in float16; pass compute_dtype=torch.float16 if that is meant, or "
                "torch.bfloat16, which has more range, for %s",
                type(self).__name__,
                use,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product of `x` ``[..., input_features]`` in the dtype of `x`."""
        weight, state = self._packed_weight(x.device)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        bias = own_tensor(self, "bias")
        if bias is not None and bias.dtype != dtype and not torch.compiler.is_compiling():
            cast_bias(self, bias, dtype)
        if x.dtype == dtype:
            return matmul_4bit(x, weight, state, bias=bias)
        check(x.is_floating_point(), type(self).__name__, "x", "floating point", x.dtype)
        return matmul_4bit(x.to(dtype), weight, state, bias=bias).to(x.dtype)


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` in FP4: one sign, two exponent bits, one fraction bit."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "fp4",
            quant_storage,
            device,
        )


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` in NF4: the quantiles of normally distributed weights."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            "nf4",
            quant_storage,
            device,
        )
