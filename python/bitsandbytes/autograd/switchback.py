# SPDX-License-Identifier: MIT
"""SwitchBack: int8 forward and gradient of the input, the gradient of the weight in full.

Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language
models", https://arxiv.org/abs/2304.13013, algorithms 1 and 3 and, for `keep_codes`, 2.
"""

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .matmul import dequantized, narrowed

__all__ = ["SwitchBack", "quantize_rows", "quantize_tensor", "quantized_product", "switchback"]


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes and the float32 statistic of every row."""
    codes, stats, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(narrowed(weight))
    return codes, stats


def quantize_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes with one statistic, which stands there once for every row."""
    codes, stat = quantize_rows(weight.reshape(1, -1))
    return codes.view(weight.shape), stat.expand(weight.shape[0]).contiguous()


def quantized_product(
    A: Tensor, codes: Tensor, stats: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Returns ``A W^T + bias`` in the dtype of A, with the rows of A quantized."""
    bias = None if bias is None else narrowed(bias)
    out = torch.ops.bitsandbytes.int8_linear.default(narrowed(A), codes, stats, bias)[0]
    # PyTorch 2.11, compiling, loses the gradients of a result that `to` returns as it was.
    return out if out.dtype == A.dtype else out.to(A.dtype)


class SwitchBack(torch.autograd.Function):
    """Differentiable form of the product; see :func:`switchback`."""

    @staticmethod
    def forward(ctx, A, weight, bias, vectorwise, keep_codes):
        """Computes ``A weight^T + bias``."""
        codes, stats = (quantize_rows if vectorwise else quantize_tensor)(weight)
        ctx.vectorwise, ctx.keep_codes = vectorwise, keep_codes
        ctx.dtypes = (A.dtype, weight.dtype, None if bias is None else bias.dtype)
        needs_A, needs_weight = ctx.needs_input_grad[:2]
        if keep_codes:
            # A quarter or half of the memory; the gradient of the weight is that of the codes.
            kept = quantize_rows(A) if needs_weight else (None, None)
            ctx.save_for_backward(*kept, *((codes, stats) if needs_A else (None, None)))
        else:
            ctx.save_for_backward(A if needs_weight else None, weight if needs_A else None)
        return quantized_product(A, codes, stats, bias)

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradients of `A`, `weight` and `bias`."""
        A_dtype, weight_dtype, bias_dtype = ctx.dtypes
        needs_A, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = grad.reshape(-1, grad.shape[-1])
        grad_A = grad_weight = grad_bias = None
        if ctx.keep_codes:
            A_codes, A_stats, codes, stats = ctx.saved_tensors
            A = dequantized(A_codes, A_stats, A_dtype) if needs_weight else None
        else:
            A, weight = ctx.saved_tensors
        if needs_A:
            if ctx.keep_codes:
                turned, turned_stats = codes.t(), stats[:1].expand(codes.shape[1]).contiguous()
            elif ctx.vectorwise:
                turned, turned_stats = quantize_rows(weight.t())
            else:
                turned, turned_stats = quantize_tensor(weight.t())
            grad_A = quantized_product(grad, turned, turned_stats).to(A_dtype)
        if needs_weight:
            grad_weight = (flat.t() @ A.reshape(-1, A.shape[-1])).to(weight_dtype)
        if needs_bias:
            grad_bias = flat.sum(0, dtype=torch.promote_types(flat.dtype, bias_dtype))
            grad_bias = grad_bias.to(bias_dtype)
        return grad_A, grad_weight, grad_bias, None, None


def switchback(
    A: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    vectorwise: bool = False,
    keep_codes: bool = False,
) -> Tensor:
    """Multiplies activations with a weight that is trained: SwitchBack.

    The result and the gradient of `A` are int8 products, the gradient of `weight`, whose sum runs
    over all tokens, is one in the dtype of `A`.

    Args:
        A: Floating-point activations ``[..., K]``.
        weight: Floating-point weight ``[N, K]``.
        bias: Floating-point vector ``[N]``.
        vectorwise: Whether each row of the weight (each column, for the gradient) has a scale of
            its own, instead of one for the tensor.
        keep_codes: Whether the backward pass gets int8 codes of `A` and `weight` instead of
            themselves: less memory, and a gradient of `weight` by the codes of `A`. Not with
            `vectorwise`.

    Returns:
        ``A @ weight.T + bias``, ``[..., N]`` in the dtype of `A`.

    Raises:
        ValueError: If both options are set.
    """
    if vectorwise and keep_codes:
        raise ValueError(
            "switchback: keep_codes must be False with vectorwise, which quantizes the weight "
            "again along its other dimension, got True"
        )
    return SwitchBack.apply(A, weight, bias, vectorwise, keep_codes)
