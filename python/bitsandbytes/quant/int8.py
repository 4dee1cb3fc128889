# SPDX-License-Identifier: MIT
"""LLM.int8(): row-wise int8 quantization and the products of int8 matrices.

Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
2022, https://arxiv.org/abs/2208.07339.
"""

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import check, check_written

__all__ = [
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
]


def int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes each row of a tensor to int8 with one float32 statistic.

    A row is a vector along the last dimension. Its statistic is the largest magnitude in it, its
    codes are ``round(a * (127 / statistic))`` in float32 with ties to even. With a threshold, a
    column that holds any magnitude of at least the threshold is an outlier column: its codes are
    zero in every row, and its outliers do not count for the statistics.

    A row of zeros has statistic 0 and codes 0. A row with NaN or infinity among the values that
    count has that as its statistic and codes 0, so that products with it are NaN.

    Args:
        A: float16, bfloat16 or float32 tensor ``[..., K]``, of any strides. It is not modified.
        threshold: Magnitude from which a value is an outlier; 0 for none.

    Returns:
        The int8 codes, of the shape of `A`; the float32 statistics ``[rows]``; and the indices of
        the outlier columns, int64 and ascending, or None if `threshold` is 0.

    Raises:
        ValueError: If `A` is of another dtype or a scalar, or `threshold` is negative or NaN.

    Example:
        >>> import torch
        >>> from bitsandbytes.functional import int8_vectorwise_quant
        >>> codes, stats, _ = int8_vectorwise_quant(torch.tensor([[1.0, -2.0], [0.5, 0.25]]))
        >>> codes
        tensor([[  64, -127],
                [ 127,   64]], dtype=torch.int8)
        >>> stats
        tensor([2.0000, 0.5000])
    """
    return torch.ops.bitsandbytes.int8_vectorwise_quant.default(A, threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """Returns the float32 values ``A * stats / 127`` of row-wise int8 codes.

    Args:
        A: int8 codes ``[..., K]``.
        stats: float32 statistics, one per row, in any shape.

    Returns:
        A float32 tensor of the shape of `A`.

    Raises:
        ValueError: If a dtype, a device or the number of statistics does not fit.

    Example:
        >>> import torch
        >>> from bitsandbytes.functional import int8_vectorwise_dequant
        >>> codes = torch.tensor([[127, -127, 0]], dtype=torch.int8)
        >>> int8_vectorwise_dequant(codes, torch.tensor([3.0]))
        tensor([[ 3., -3.,  0.]])
    """
    return torch.ops.bitsandbytes.int8_vectorwise_dequant.default(A, stats)


def int8_linear_matmul(
    A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Returns the exact integer product ``A @ B.T``.

    Args:
        A: int8 tensor ``[..., K]``.
        B: int8 matrix ``[N, K]``, such as the codes of the weight of a linear layer.
        out: int32 tensor ``[..., N]`` that takes the result.
        dtype: ``torch.int32``, the only result there is.

    Returns:
        The int32 product ``[..., N]``, or `out`. Sums that int32 cannot hold, which takes more
        than 133 000 terms, wrap.

    Raises:
        ValueError: If a dtype, a shape or a device does not fit.

    Example:
        >>> import torch
        >>> from bitsandbytes.functional import int8_linear_matmul
        >>> A = torch.tensor([[100, 100]], dtype=torch.int8)
        >>> int8_linear_matmul(A, torch.tensor([[100, 27], [1, -1]], dtype=torch.int8))
        tensor([[12700,     0]], dtype=torch.int32)
    """
    check(dtype is torch.int32, "int8_linear_matmul", "dtype", "torch.int32", dtype)
    if out is None:
        return torch.ops.bitsandbytes.int8_linear_matmul.default(A, B)
    torch.ops.bitsandbytes.int8_linear_matmul.out(A, B, out)
    return out


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns the values of an int8 product: ``A * row_stats * col_stats / 127^2 + bias``.

    Everything is float32 until the one rounding at the end.

    Args:
        A: int32 product ``[..., N]`` of :func:`int8_linear_matmul`.
        row_stats: float32 statistics of the left operand, one per row of `A`, in any shape.
        col_stats: float32 statistics of the right operand, one per column of `A`, in any shape.
        out: Tensor of the shape of `A` that takes the result, rounded to its dtype.
        bias: Floating-point vector ``[N]``.

    Returns:
        A float16 tensor of the shape of `A`, or `out`.

    Raises:
        ValueError: If a dtype, a shape or a device does not fit.

    Example:
        >>> import torch
        >>> from bitsandbytes.functional import int8_mm_dequant
        >>> product = torch.tensor([[16129, -16129]], dtype=torch.int32)
        >>> int8_mm_dequant(product, torch.tensor([2.0]), torch.tensor([1.0, 0.5]))
        tensor([[ 2., -1.]], dtype=torch.float16)
    """
    op = torch.ops.bitsandbytes.int8_mm_dequant.default
    if out is None:
        return op(A, row_stats, col_stats, torch.float16, bias)
    check(
        out.shape == A.shape and out.is_floating_point(),
        "int8_mm_dequant",
        "out",
        f"a floating-point tensor of shape {list(A.shape)}",
        f"{out.dtype} of shape {list(out.shape)}",
    )
    check_written("int8_mm_dequant", "out", out)
    dtype = torch.float32 if out.dtype == torch.float64 else out.dtype
    return out.copy_(op(A, row_stats, col_stats, dtype, bias))
