# SPDX-License-Identifier: MIT
"""Products whose operands are quantized to int8 in both directions of training.

The first interface of int8 training; `mm_cublas`, `bmm_cublas` and `matmul_cublas` are one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_output
from ..quant.integer import exact_product
from ..quant.vectorwise import vectorwise_mm_dequant, vectorwise_quant

__all__ = ["MatMul8bit", "bmm_cublas", "matmul_cublas", "mm_cublas"]

QUANT_TYPES = ("vector", "linear")
INT8 = 8


def _product(A: Tensor, B: Tensor, quant_type: str, bits: int) -> Tensor:
    """Returns ``A @ B`` in the dtype of A, by codes of the rows of A and of the columns of B."""
    if bits != INT8:
        return A @ B.to(A.dtype)
    left, left_scales = vectorwise_quant(A, -1, quant_type)
    right, right_scales = vectorwise_quant(B, -2, quant_type)
    product = exact_product("matmul_cublas", left, right)
    return vectorwise_mm_dequant(product, left_scales, right_scales, A.dtype, quant_type)


class MatMul8bit(torch.autograd.Function):
    """Differentiable product; see :func:`matmul_cublas`."""

    @staticmethod
    def forward(ctx, A, B, out=None, quant_type="vector", precision=None):
        """Computes ``A @ B``."""
        precision = [INT8] * 3 if precision is None else list(precision)
        if quant_type not in QUANT_TYPES:
            raise ValueError(
                f"matmul_cublas: quant_type must be one of {', '.join(QUANT_TYPES)}, "
                f"got {quant_type}"
            )
        if len(precision) != 3:
            raise ValueError(f"matmul_cublas: precision must be three numbers, got {precision}")
        ctx.save_for_backward(A, B)
        ctx.quant_type, ctx.precision = quant_type, precision
        result = _product(A, B, quant_type, precision[0])
        if out is None:
            return result
        check_output("matmul_cublas", "out", out, result.shape)
        ctx.mark_dirty(out)
        return out.copy_(result)

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradients of `A` and `B`."""
        A, B = ctx.saved_tensors
        _, bits_B, bits_A = ctx.precision
        grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            grad_A = _product(grad, B.transpose(-2, -1), ctx.quant_type, bits_A).to(A.dtype)
        if ctx.needs_input_grad[1]:
            left, right = A, grad
            if B.dim() == 2:
                left, right = A.reshape(-1, A.shape[-1]), grad.reshape(-1, grad.shape[-1])
            left = left.transpose(-2, -1)
            grad_B = _product(left, right, ctx.quant_type, bits_B).to(B.dtype)
        return grad_A, grad_B, None, None, None


def matmul_cublas(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    quant_type: str = "vector",
    precision: Sequence[int] | None = None,
) -> Tensor:
    """Multiplies with operands quantized to int8, forward and backward.

    Args:
        A: Floating-point ``[M, K]`` or ``[batch, M, K]``.
        B: Floating-point ``[K, N]`` or ``[batch, K, N]``.
        out: Tensor that takes the result.
        quant_type: ``"vector"``: a scale for each row of the left and each column of the right
            operand; ``"linear"``: one for each operand.
        precision: Bits of three products: the result, the gradient of `B`, the gradient of `A`. A
            number other than 8 means that this one is made in floating point.

    Returns:
        ``A @ B`` in the dtype of `A`; `out` if given.

    Raises:
        ValueError: If the shapes or an option do not fit.

    Example:
        >>> bnb.matmul_cublas(torch.eye(2), torch.tensor([[127.0, 1], [3, 127]]))
        tensor([[127.,   1.],
                [  3., 127.]])
    """
    return MatMul8bit.apply(A, B, out, quant_type, precision)


mm_cublas = bmm_cublas = matmul_cublas
