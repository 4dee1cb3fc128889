# SPDX-License-Identifier: MIT
"""LLM.int8() in plain PyTorch: the rule that every native kernel follows, bit for bit.

Rows are quantized to codes in [-127, 127] with one float32 statistic per row, the product is an
exact int32 product of codes, and columns that hold an outlier are multiplied in floating point
(Dettmers et al. 2022, arXiv:2208.07339).
"""

import math

import torch
from torch import Tensor

from .._checks import (
    FLOATS,
    check,
    check_device,
    check_dtype,
    check_numel,
    check_shape,
)
from .._ops import register_kernel
from .._precision import full_precision

__all__: list[str] = []

CODE_MAX = 127.0
# What one unit of a code, and one unit of a product of two codes, is worth in its statistics.
UNIT = 1.0 / CODE_MAX
PRODUCT_UNIT = 1.0 / (CODE_MAX * CODE_MAX)
# A product of two int8 numbers is at most 2^14, so sums of 2^10 of them are exact in float32.
EXACT_TERMS = 1024


def _rows(shape: torch.Size) -> int:
    return math.prod(shape[:-1])


def _check_product(op: str, A: Tensor, B: Tensor) -> None:
    check_dtype(op, "A", A, torch.int8)
    check_dtype(op, "B", B, torch.int8)
    check_device(op, "B", B, "A", A)
    check(A.dim() >= 1, op, "A", "of at least one dimension", "a scalar")
    if B.dim() != 2 or B.shape[1] != A.shape[-1]:
        expected = f"[N, {A.shape[-1]}] for A of shape {list(A.shape)}"
        check(False, op, "B", expected, list(B.shape))


def _check_scales(
    op: str,
    stats: tuple[tuple[str, Tensor, int, str], tuple[str, Tensor, int, str]],
    device_of: tuple[str, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Checks row and column statistics (name, tensor, count, of what), bias and result dtype."""
    for name, stat, count, of_what in stats:
        check_dtype(op, name, stat, torch.float32)
        check_device(op, name, stat, *device_of)
        check_numel(op, name, stat, count, of_what)
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_device(op, "bias", bias, *device_of)
        check_shape(op, "bias", bias, [stats[1][2]])
    check(dtype in FLOATS, op, "dtype", "float16, bfloat16 or float32", dtype)


@register_kernel("int8_vectorwise_quant", "default")
@torch.no_grad()
def int8_vectorwise_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    op = "int8_vectorwise_quant"
    check_dtype(op, "A", A, *FLOATS)
    check(A.dim() >= 1, op, "A", "of at least one dimension", "a scalar")
    check(threshold >= 0, op, "threshold", "0 (no outliers) or positive", threshold)

    codes, row_stats, outlier_mask = _quantized_rows(A, threshold)
    return codes, row_stats, None if outlier_mask is None else outlier_mask.nonzero().flatten()


def _check_layer(op: str, name: str, other: Tensor, CB: Tensor, SCB: Tensor, dim: int) -> None:
    """Checks operands of a layer; dimension `dim` of the weight is as long as rows of `other`."""
    check_dtype(op, name, other, *FLOATS)
    check(other.dim() >= 1, op, name, "of at least one dimension", "a scalar")
    check_dtype(op, "CB", CB, torch.int8)
    check_device(op, "CB", CB, name, other)
    if CB.dim() != 2 or CB.shape[dim] != other.shape[-1]:
        shape = f"[N, {other.shape[-1]}]" if dim else f"[{other.shape[-1]}, K]"
        check(False, op, "CB", f"{shape} for {name} of shape {list(other.shape)}", list(CB.shape))
    check_dtype(op, "SCB", SCB, torch.float32)
    check_device(op, "SCB", SCB, name, other)
    check_numel(op, "SCB", SCB, CB.shape[0], "rows of CB")


def _quantized_rows(A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns codes, statistics, and with a threshold the mask of the outlier columns."""
    rows, columns = _rows(A.shape), A.shape[-1]
    values = A.reshape(rows, columns).float()
    magnitudes = values.abs()
    outlier_mask = None
    if threshold > 0:
        outliers = magnitudes >= threshold
        magnitudes.masked_fill_(outliers, 0)
        outlier_mask = outliers.any(0)
    row_stats = magnitudes.amax(1) if columns else magnitudes.new_zeros(rows)

    # A scalar divided by a tensor would be its rounded reciprocal times the scalar.
    scales = torch.full_like(row_stats, CODE_MAX) / row_stats
    # The codes of a row without a usable scale are 0: for a statistic of 0 or so small that the
    # scale overflows, and for one that is not finite. The latter turns that row of every product
    # into NaN, so bad input shows.
    scales.masked_fill_(scales.isinf(), 0)
    codes = values * scales.unsqueeze(1)
    codes.round_().clamp_(-CODE_MAX, CODE_MAX).nan_to_num_(0.0)
    if outlier_mask is not None:
        codes.masked_fill_(outlier_mask, 0)
    return codes.to(torch.int8).view(A.shape), row_stats, outlier_mask


@register_kernel("int8_double_quant", "default")
@torch.no_grad()
def int8_double_quant(
    A: Tensor, threshold: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    op = "int8_double_quant"
    check_dtype(op, "A", A, *FLOATS)
    check(A.dim() >= 1, op, "A", "of at least one dimension", "a scalar")
    check(threshold >= 0, op, "threshold", "0 (no outliers) or positive", threshold)

    quantize = torch.ops.bitsandbytes.int8_vectorwise_quant.default
    rows, row_stats, outlier_cols = quantize(A, threshold)
    values = A if threshold == 0 else A.masked_fill(A.abs() >= threshold, 0)
    turned = values.reshape(_rows(A.shape), A.shape[-1]).t()
    cols, col_stats, _ = quantize(turned)
    return rows, cols.t().reshape(A.shape).contiguous(), row_stats, col_stats, outlier_cols


@register_kernel("int8_vectorwise_dequant.dtype", "default")
@torch.no_grad()
def int8_vectorwise_dequant_dtype(A: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    op = "int8_vectorwise_dequant"
    check_dtype(op, "A", A, torch.int8)
    check(A.dim() >= 1, op, "A", "of at least one dimension", "a scalar")
    check_dtype(op, "stats", stats, torch.float32)
    check_device(op, "stats", stats, "A", A)
    check_numel(op, "stats", stats, _rows(A.shape), "rows of A")
    check(dtype in FLOATS, op, "dtype", "float16, bfloat16 or float32", dtype)

    scales = stats.reshape(*A.shape[:-1], 1)
    values = torch.empty(A.shape, dtype=torch.float32, device=A.device)
    return values.copy_(A).mul_(scales).mul_(UNIT).to(dtype)


@register_kernel("int8_vectorwise_dequant", "default")
def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    return int8_vectorwise_dequant_dtype(A, stats, torch.float32)


@register_kernel("int8_linear_matmul", "default")
@torch.no_grad()
def int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    _check_product("int8_linear_matmul", A, B)
    return _product(A, B)


@register_kernel("int8_linear_matmul.out", "default")
@torch.no_grad()
def int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    op = "int8_linear_matmul"
    _check_product(op, A, B)
    check_dtype(op, "out", out, torch.int32)
    check_device(op, "out", out, "A", A)
    check_shape(op, "out", out, [*A.shape[:-1], B.shape[0]])
    out.copy_(_product(A, B))


def _product(A: Tensor, B: Tensor) -> Tensor:
    """Returns the int32 product, exact for any length and wrapping like native int32 sums."""
    a = A.reshape(_rows(A.shape), A.shape[-1])
    return _summed(a, B, torch.int32).view(*A.shape[:-1], B.shape[0])


def _summed(a: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``a B^T``, a part of the terms at a time, so that codes are widened in parts only."""
    total = torch.zeros(a.shape[0], B.shape[0], dtype=dtype, device=a.device)
    with full_precision(a.device):
        for start in range(0, a.shape[1], EXACT_TERMS):
            part = slice(start, start + EXACT_TERMS)
            total += (a[:, part].float() @ B[:, part].float().t()).to(dtype)
    return total


@register_kernel("int8_mm_dequant", "default")
@torch.no_grad()
def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    op = "int8_mm_dequant"
    dtype = dtype or torch.float16
    check_dtype(op, "A", A, torch.int32)
    check(A.dim() >= 1, op, "A", "of at least one dimension", "a scalar")
    stats = (
        ("row_stats", row_stats, _rows(A.shape), "rows of A"),
        ("col_stats", col_stats, A.shape[-1], "columns of A"),
    )
    _check_scales(op, stats, ("A", A), bias, dtype)
    return _finish(_scaled(A, row_stats, col_stats), bias, dtype)


def _scaled(product: Tensor, row_stats: Tensor, col_stats: Tensor) -> Tensor:
    """Returns the float32 worth of an int32 product, in a tensor of its own."""
    rows = row_stats.reshape(*product.shape[:-1], 1)
    return product.float().mul_(rows).mul_(col_stats.flatten() * PRODUCT_UNIT)


def _finish(result: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Adds the bias in float32 and rounds once."""
    if bias is not None:
        result += bias.float()
    return result.to(dtype)


@register_kernel("int8_scaled_mm", "default")
@torch.no_grad()
def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    op = "int8_scaled_mm"
    dtype = dtype or torch.float16
    _check_product(op, A, B)
    stats = (
        ("row_stats", row_stats, _rows(A.shape), "rows of A"),
        ("col_stats", col_stats, B.shape[0], "rows of B"),
    )
    _check_scales(op, stats, ("A", A), bias, dtype)
    product = torch.ops.bitsandbytes.int8_linear_matmul.default(A, B)
    return _finish(_scaled(product, row_stats, col_stats), bias, dtype)


@register_kernel("int8_linear", "default")
@torch.no_grad()
def int8_linear(
    A: Tensor,
    CB: Tensor,
    SCB: Tensor,
    bias: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    op = "int8_linear"
    _check_layer(op, "A", A, CB, SCB, 1)
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_device(op, "bias", bias, "A", A)
        check_shape(op, "bias", bias, [CB.shape[0]])
    check(threshold >= 0, op, "threshold", "0 (no outliers) or positive", threshold)

    CA, SCA, outlier_mask = _quantized_rows(A, threshold)
    result = _scaled(_product(CA, CB), SCA, SCB)
    if outlier_mask is not None:
        # All columns, those of no outliers as zeros: their number would be for the host to read.
        values = A.reshape(_rows(A.shape), A.shape[-1]).float().masked_fill(~outlier_mask, 0)
        correction = _summed(values, CB, torch.float32).mul_(SCB.flatten() * UNIT)
        result += correction.view(result.shape)
    return _finish(result, bias, A.dtype), outlier_mask


@register_kernel("int8_linear_dgrad", "default")
@torch.no_grad()
def int8_linear_dgrad(grad: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    op = "int8_linear_dgrad"
    _check_layer(op, "grad", grad, CB, SCB, 0)
    return grad @ int8_vectorwise_dequant_dtype(CB, SCB, grad.dtype)


@register_kernel("int8_mixed_scaled_mm", "default")
@torch.no_grad()
def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    op = "int8_mixed_scaled_mm"
    _check_product(op, CA, CB)
    check_dtype(op, "A", A, *FLOATS)
    check_device(op, "A", A, "CA", CA)
    check_shape(op, "A", A, CA.shape)
    stats = (
        ("SCA", SCA, _rows(CA.shape), "rows of CA"),
        ("SCB", SCB, CB.shape[0], "rows of CB"),
    )
    _check_scales(op, stats, ("CA", CA), bias, A.dtype)
    if outlier_cols is not None:
        check_dtype(op, "outlier_cols", outlier_cols, torch.int64, torch.int32)
        check_device(op, "outlier_cols", outlier_cols, "CA", CA)
        check(outlier_cols.dim() == 1, op, "outlier_cols", "1-D", list(outlier_cols.shape))

    product = torch.ops.bitsandbytes.int8_linear_matmul.default(CA, CB)
    result = _scaled(product, SCA, SCB)
    if outlier_cols is None:
        return _finish(result, bias, A.dtype), A.new_empty(0)
    outliers = A.reshape(_rows(A.shape), A.shape[-1])[:, outlier_cols]
    with full_precision(A.device):
        correction = outliers.float() @ CB[:, outlier_cols].float().t()
    result += correction.mul_(SCB.flatten() * UNIT).view(result.shape)
    return _finish(result, bias, A.dtype), outliers
