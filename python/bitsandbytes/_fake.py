# SPDX-License-Identifier: MIT
"""Shape rules of every op, for torch.compile, export and the meta device."""

import math

import torch
from torch import Tensor

from ._checks import FLOATS, OFFSETS
from ._codes4 import BLOCKSIZES, QUANT_TYPES, STORAGES
from ._ops import register_fake

__all__: list[str] = []


def _check(condition, op: str, argument: str, expected: str, got) -> None:
    torch._check(condition, lambda: f"{op}: {argument} must be {expected}, got {got}")


def _blocks(n, blocksize: int):
    return (n + blocksize - 1) // blocksize


@register_fake("quantize_blockwise")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    op = "quantize_blockwise"
    _check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    absmax = A.new_empty((_blocks(A.numel(), blocksize),), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


@register_fake("quantize_blockwise.out")
def _(A: Tensor, code: Tensor, blocksize: int, *, out: Tensor, absmax: Tensor) -> None:
    op = "quantize_blockwise"
    _check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    _check(out.dtype == torch.uint8, op, "out", "uint8", out.dtype)
    _check(out.numel() == A.numel(), op, "out", "as large as A", out.shape)


@register_fake("dequantize_blockwise")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    op = "dequantize_blockwise"
    _check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check(A.dtype == torch.uint8, op, "A", "uint8", A.dtype)
    _check(dtype in FLOATS, op, "dtype", "float32, float16 or bfloat16", dtype)
    return A.new_empty(A.shape, dtype=dtype)


@register_fake("dequantize_blockwise.out")
def _(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    op = "dequantize_blockwise"
    _check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check(A.dtype == torch.uint8, op, "A", "uint8", A.dtype)
    _check(out.dtype == dtype, op, "out", str(dtype), out.dtype)
    _check(out.numel() == A.numel(), op, "out", "as large as A", out.shape)


@register_fake("quantize_blockwise_stochastic")
def _(A: Tensor, code: Tensor, blocksize: int, rand: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    op = "quantize_blockwise_stochastic"
    _check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    _check(rand.dtype == torch.float32, op, "rand", "float32", rand.dtype)
    absmax = A.new_empty((_blocks(A.numel(), blocksize),), dtype=torch.float32)
    return A.new_empty(A.shape, dtype=torch.uint8), absmax


@register_fake("quantize_no_absmax")
def _(A: Tensor, code: Tensor) -> Tensor:
    op = "quantize_no_absmax"
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    return A.new_empty(A.shape, dtype=torch.uint8)


@register_fake("estimate_quantiles")
def _(A: Tensor, offset: float) -> Tensor:
    op = "estimate_quantiles"
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    return A.new_empty((256,), dtype=torch.float32)


@register_fake("dequantize_blockwise_nested")
def _(
    A: Tensor,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    code: Tensor,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    op = "dequantize_blockwise_nested"
    _check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check(A.dtype == torch.uint8, op, "A", "uint8", A.dtype)
    _check(dtype in FLOATS, op, "dtype", "float32, float16 or bfloat16", dtype)
    return A.new_empty(A.shape, dtype=dtype)


@register_fake("dequantize_blockwise_nested.out")
def _(
    A: Tensor,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    code: Tensor,
    blocksize: int,
    nested_blocksize: int,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    op = "dequantize_blockwise_nested"
    _check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check(A.dtype == torch.uint8, op, "A", "uint8", A.dtype)
    _check(out.dtype == dtype, op, "out", str(dtype), out.dtype)
    _check(out.numel() == A.numel(), op, "out", "as large as A", out.shape)


def _check_4bit(op: str, blocksize: int, quant_type: str, name: str, dtype: torch.dtype) -> None:
    _check(blocksize in BLOCKSIZES, op, "blocksize", f"one of {BLOCKSIZES}", blocksize)
    _check(quant_type in QUANT_TYPES, op, "quant_type", "nf4 or fp4", quant_type)
    _check(dtype in FLOATS, op, name, "float32, float16 or bfloat16", dtype)


@register_fake("quantize_4bit")
def _(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check_4bit("quantize_4bit", blocksize, quant_type, "A", A.dtype)
    packed = _blocks(_blocks(A.numel(), 2), quant_storage.itemsize)
    absmax = A.new_empty((_blocks(A.numel(), blocksize),), dtype=torch.float32)
    return A.new_empty((packed, 1), dtype=quant_storage), absmax


@register_fake("quantize_4bit.out")
def _(
    A: Tensor,
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
    *,
    out: Tensor,
    absmax: Tensor,
) -> None:
    op = "quantize_4bit"
    _check_4bit(op, blocksize, quant_type, "A", A.dtype)
    packed = _blocks(_blocks(A.numel(), 2), quant_storage.itemsize)
    _check(out.dtype == quant_storage, op, "out", str(quant_storage), out.dtype)
    _check(out.numel() == packed, op, "out", f"of {packed} elements", out.shape)


@register_fake("dequantize_4bit")
def _(A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape, dtype) -> Tensor:
    op = "dequantize_4bit"
    _check_4bit(op, blocksize, quant_type, "dtype", dtype)
    _check(absmax.dtype == torch.float32, op, "absmax", "float32", absmax.dtype)
    return A.new_empty(shape, dtype=dtype)


@register_fake("dequantize_4bit.out")
def _(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape, dtype, out: Tensor
) -> None:
    op = "dequantize_4bit"
    _check_4bit(op, blocksize, quant_type, "dtype", dtype)
    _check(absmax.dtype == torch.float32, op, "absmax", "float32", absmax.dtype)
    _check(out.dtype == dtype, op, "out", str(dtype), out.dtype)
    _check(out.numel() == math.prod(shape), op, "out", f"as large as {shape}", out.shape)


@register_fake("dequantize_4bit_nested")
def _(
    A: Tensor,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    shape,
    dtype,
) -> Tensor:
    _check_4bit("dequantize_4bit_nested", blocksize, quant_type, "dtype", dtype)
    return A.new_empty(shape, dtype=dtype)


@register_fake("dequantize_4bit_nested.out")
def _(
    A: Tensor,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    shape,
    dtype,
    out: Tensor,
) -> None:
    op = "dequantize_4bit_nested"
    _check_4bit(op, blocksize, quant_type, "dtype", dtype)
    _check(out.dtype == dtype, op, "out", str(dtype), out.dtype)
    _check(out.numel() == math.prod(shape), op, "out", f"as large as {shape}", out.shape)


def _gemm_4bit_shape(op: str, name: str, A: Tensor, B: Tensor, shapeB, blocksize, transposed):
    """Checks what every product with a 4-bit weight takes; returns the shape of the result."""
    _check(len(shapeB) == 2, op, "shapeB", "[N, K]", shapeB)
    given, wanted = (0, 1) if transposed else (1, 0)
    _check(A.dim() >= 1, op, name, "of at least one dimension", "a scalar")
    _check(A.shape[-1] == shapeB[given], op, name, f"[..., {shapeB[given]}]", A.shape)
    _check(A.dtype in FLOATS, op, name, "float32, float16 or bfloat16", A.dtype)
    _check(B.dtype in STORAGES, op, "B", "of an integer or floating-point dtype", B.dtype)
    _check(blocksize in BLOCKSIZES, op, "blocksize", f"one of {set(BLOCKSIZES)}", blocksize)
    return (*A.shape[:-1], shapeB[wanted])


def _check_gemm_4bit_scales(
    op: str,
    quant_type: str,
    absmax: Tensor,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
) -> None:
    _check(quant_type in QUANT_TYPES, op, "quant_type", "nf4 or fp4", quant_type)
    _check(absmax.dtype == torch.float32, op, "absmax", "float32", absmax.dtype)
    if absmax_8bit is None:
        return
    _check(absmax_8bit.dtype == torch.uint8, op, "absmax_8bit", "uint8", absmax_8bit.dtype)
    _check(absmax_8bit.dim() == 1, op, "absmax_8bit", "1-D", absmax_8bit.shape)
    for name, tensor, shape in (
        ("absmax_code", absmax_code, (256,)),
        ("absmax_offset", absmax_offset, ()),
    ):
        _check(tensor is not None, op, name, "given with absmax_8bit", None)
        _check(tensor.dtype == torch.float32, op, name, "float32", tensor.dtype)
        _check(tensor.shape == shape, op, name, f"of shape {shape}", tensor.shape)


@register_fake("gemm_4bit")
def _(
    A: Tensor,
    B: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "gemm_4bit"
    shape = _gemm_4bit_shape(op, "A", A, B, shapeB, blocksize, transposed=False)
    _check_gemm_4bit_scales(op, quant_type, absmax, absmax_8bit, absmax_code, absmax_offset)
    if bias is not None:
        _check(bias.dtype == A.dtype, op, "bias", f"{A.dtype} as A", bias.dtype)
        _check(bias.shape == (shapeB[0],), op, "bias", f"of shape [{shapeB[0]}]", bias.shape)
    return A.new_empty(shape)


@register_fake("gemm_4bit_dgrad")
def _(
    grad: Tensor,
    B: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "gemm_4bit_dgrad"
    shape = _gemm_4bit_shape(op, "grad", grad, B, shapeB, blocksize, transposed=True)
    _check_gemm_4bit_scales(op, quant_type, absmax, absmax_8bit, absmax_code, absmax_offset)
    return grad.new_empty(shape)


def _grouped_gemm_4bit_shape(
    op: str, name: str, A: Tensor, B: Tensor, offs: Tensor, shapeB, blocksize, transposed
):
    """Checks what every grouped product takes; returns the shape of the result."""
    _check(A.dim() == 2, op, name, "2-D", A.shape)
    _check(len(shapeB) == 3, op, "shapeB", "[E, N, K]", shapeB)
    _check(offs.dtype in OFFSETS, op, "offs", "int32 or int64", offs.dtype)
    _check(offs.shape == (shapeB[0],), op, "offs", f"of shape [{shapeB[0]}]", offs.shape)
    _check(offs.device == A.device, op, "offs", f"on {A.device} as {name}", offs.device)
    return _gemm_4bit_shape(op, name, A, B, shapeB[1:], blocksize, transposed)


@register_fake("grouped_gemm_4bit")
def _(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "grouped_gemm_4bit"
    shape = _grouped_gemm_4bit_shape(op, "A", A, B, offs, shapeB, blocksize, transposed=False)
    _check_gemm_4bit_scales(op, quant_type, absmax, absmax_8bit, absmax_code, absmax_offset)
    if bias is not None:
        _check(bias.dtype == A.dtype, op, "bias", f"{A.dtype} as A", bias.dtype)
        _check(bias.shape == tuple(shapeB[:2]), op, "bias", f"of shape {shapeB[:2]}", bias.shape)
    return A.new_empty(shape)


@register_fake("grouped_gemm_4bit_dgrad")
def _(
    grad: Tensor,
    B: Tensor,
    offs: Tensor,
    shapeB,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "grouped_gemm_4bit_dgrad"
    shape = _grouped_gemm_4bit_shape(op, "grad", grad, B, offs, shapeB, blocksize, transposed=True)
    _check_gemm_4bit_scales(op, quant_type, absmax, absmax_8bit, absmax_code, absmax_offset)
    return grad.new_empty(shape)


@register_fake("gemv_4bit")
def _(A: Tensor, B: Tensor, shapeB, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    shape = _gemm_4bit_shape("gemv_4bit", "A", A, B, shapeB, blocksize, transposed=False)
    return A.new_empty(shape)


@register_fake("gemv_4bit.out")
def _(
    A: Tensor, B: Tensor, shapeB, absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    op = "gemv_4bit"
    shape = _gemm_4bit_shape(op, "A", A, B, shapeB, blocksize, transposed=False)
    _check(tuple(out.shape) == shape, op, "out", f"of shape {shape}", tuple(out.shape))
    _check(out.device == A.device, op, "out", f"on {A.device} as A", out.device)
    _check(out.dtype == A.dtype, op, "out", f"{A.dtype} as A", out.dtype)


@register_fake("int8_vectorwise_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    op = "int8_vectorwise_quant"
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    out = A.new_empty(A.shape, dtype=torch.int8)
    row_stats = A.new_empty((math.prod(A.shape[:-1]),), dtype=torch.float32)
    if threshold == 0.0:
        return out, row_stats, None
    count = torch.library.get_ctx().new_dynamic_size()
    return out, row_stats, A.new_empty((count,), dtype=torch.int64)


@register_fake("int8_double_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    op = "int8_double_quant"
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    codes = [A.new_empty(A.shape, dtype=torch.int8) for _ in range(2)]
    row_stats = A.new_empty((math.prod(A.shape[:-1]),), dtype=torch.float32)
    col_stats = A.new_empty((A.shape[-1],), dtype=torch.float32)
    if threshold == 0.0:
        return *codes, row_stats, col_stats, None
    count = torch.library.get_ctx().new_dynamic_size()
    return *codes, row_stats, col_stats, A.new_empty((count,), dtype=torch.int64)


@register_fake("int8_vectorwise_dequant")
def _(A: Tensor, stats: Tensor) -> Tensor:
    _check(A.dtype == torch.int8, "int8_vectorwise_dequant", "A", "int8", A.dtype)
    return A.new_empty(A.shape, dtype=torch.float32)


@register_fake("int8_vectorwise_dequant.dtype")
def _(A: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    op = "int8_vectorwise_dequant"
    _check(A.dtype == torch.int8, op, "A", "int8", A.dtype)
    _check(dtype in FLOATS, op, "dtype", "float32, float16 or bfloat16", dtype)
    return A.new_empty(A.shape, dtype=dtype)


def _matmul_shape(op: str, A: Tensor, B: Tensor) -> tuple:
    _check(A.dtype == torch.int8, op, "A", "int8", A.dtype)
    _check(B.dtype == torch.int8, op, "B", "int8", B.dtype)
    _check(B.dim() == 2, op, "B", "of shape [N, K]", B.shape)
    _check(A.shape[-1] == B.shape[1], op, "A", f"[..., {B.shape[1]}]", A.shape)
    return (*A.shape[:-1], B.shape[0])


@register_fake("int8_linear_matmul")
def _(A: Tensor, B: Tensor) -> Tensor:
    return A.new_empty(_matmul_shape("int8_linear_matmul", A, B), dtype=torch.int32)


@register_fake("int8_linear_matmul.out")
def _(A: Tensor, B: Tensor, out: Tensor) -> None:
    op = "int8_linear_matmul"
    shape = _matmul_shape(op, A, B)
    _check(out.dtype == torch.int32, op, "out", "int32", out.dtype)
    _check(tuple(out.shape) == shape, op, "out", f"of shape {shape}", tuple(out.shape))


@register_fake("int8_mm_dequant")
def _(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _check(A.dtype == torch.int32, "int8_mm_dequant", "A", "int32", A.dtype)
    return A.new_empty(A.shape, dtype=dtype or torch.float16)


@register_fake("int8_scaled_mm")
def _(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return A.new_empty(_matmul_shape("int8_scaled_mm", A, B), dtype=dtype or torch.float16)


@register_fake("int8_linear")
def _(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None = None, threshold: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    op = "int8_linear"
    _check(A.dtype in FLOATS, op, "A", "float32, float16 or bfloat16", A.dtype)
    _check(CB.dtype == torch.int8, op, "CB", "int8", CB.dtype)
    _check(CB.dim() == 2, op, "CB", "of shape [N, K]", CB.shape)
    _check(A.shape[-1] == CB.shape[1], op, "A", f"[..., {CB.shape[1]}]", A.shape)
    out = A.new_empty((*A.shape[:-1], CB.shape[0]))
    return out, A.new_empty((A.shape[-1],), dtype=torch.bool) if threshold > 0 else None


@register_fake("int8_linear_dgrad")
def _(grad: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    op = "int8_linear_dgrad"
    _check(grad.dtype in FLOATS, op, "grad", "float32, float16 or bfloat16", grad.dtype)
    _check(CB.dtype == torch.int8, op, "CB", "int8", CB.dtype)
    _check(CB.dim() == 2, op, "CB", "of shape [N, K]", CB.shape)
    _check(grad.shape[-1] == CB.shape[0], op, "grad", f"[..., {CB.shape[0]}]", grad.shape)
    return grad.new_empty((*grad.shape[:-1], CB.shape[1]))


@register_fake("int8_mixed_scaled_mm")
def _(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    shape = _matmul_shape("int8_mixed_scaled_mm", CA, CB)
    if outlier_cols is None:
        return A.new_empty(shape), A.new_empty((0,))
    return A.new_empty(shape), A.new_empty((math.prod(A.shape[:-1]), outlier_cols.shape[0]))


def _check_step(op: str, params: list[Tensor], grads: list[Tensor]) -> None:
    _check(len(params) > 0, op, "params", "a list of at least one tensor", "an empty list")
    _check(len(grads) == len(params), op, "grads", f"a list of {len(params)}", len(grads))


@register_fake("optimizer_step_32bit")
def _(rule, params, grads, state1, state2, *rest) -> None:
    _check_step("optimizer_step_32bit", params, grads)


@register_fake("optimizer_step_8bit_blockwise")
def _(rule, params, grads, state1, state2, *rest) -> None:
    _check_step("optimizer_step_8bit_blockwise", params, grads)


@register_fake("optimizer_step_8bit")
def _(rule, params, grads, state1, state2, *rest) -> None:
    _check_step("optimizer_step_8bit", params, grads)


def _preview(op: str, params: list[Tensor], grads: list[Tensor]) -> Tensor:
    _check_step(op, params, grads)
    return params[0].new_empty((2, len(params)), dtype=torch.float32)


@register_fake("optimizer_preview_32bit")
def _(rule, params, grads, state1, state2, *rest) -> Tensor:
    return _preview("optimizer_preview_32bit", params, grads)


@register_fake("optimizer_preview_8bit_blockwise")
def _(rule, params, grads, state1, state2, *rest) -> Tensor:
    return _preview("optimizer_preview_8bit_blockwise", params, grads)


@register_fake("optimizer_preview_8bit")
def _(rule, params, grads, state1, state2, *rest) -> Tensor:
    return _preview("optimizer_preview_8bit", params, grads)


@register_fake("percentile_clipping_step")
def _(grads: list[Tensor], gnorm_vec: list[Tensor], step: Tensor, percentile: int) -> Tensor:
    op = "percentile_clipping_step"
    _check(len(grads) > 0, op, "grads", "a list of at least one tensor", "an empty list")
    _check(len(gnorm_vec) == len(grads), op, "gnorm_vec", f"a list of {len(grads)}", len(gnorm_vec))
    return grads[0].new_empty((3, len(grads)), dtype=torch.float32)


def _check_update(op: str, g: Tensor, p: Tensor) -> None:
    _check(g.numel() == p.numel(), op, "g", f"of {p.numel()} elements as p", g.shape)
    _check(g.dtype in FLOATS, op, "g", "float32, float16 or bfloat16", g.dtype)
    _check(g.dtype == p.dtype, op, "p", f"{g.dtype} as g", p.dtype)


@register_fake("optimizer_update_32bit")
def _(optimizer_name, g: Tensor, p: Tensor, *rest) -> None:
    _check_update("optimizer_update_32bit", g, p)


@register_fake("optimizer_update_8bit_blockwise")
def _(
    optimizer_name,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1,
    beta2,
    beta3,
    alpha,
    eps,
    step,
    lr,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    *rest,
) -> None:
    op = "optimizer_update_8bit_blockwise"
    _check_update(op, g, p)
    for names, tensors, dtype in (
        (("state1", "state2"), (state1, state2), torch.uint8),
        (("qmap1", "qmap2"), (qmap1, qmap2), torch.float32),
        (("absmax1", "absmax2"), (absmax1, absmax2), torch.float32),
    ):
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None:
                _check(tensor.dtype == dtype, op, name, str(dtype), tensor.dtype)
