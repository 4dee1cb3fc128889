# SPDX-License-Identifier: MIT
"""Products with a 4-bit weight in plain PyTorch: what every native kernel computes.

The weight is dequantized to the dtype of the other operand, products are summed in float32.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional
from torch import Tensor

from .._checks import FLOATS, check, check_device, check_dtype, check_numel, check_shape
from .._codes4 import BLOCKSIZES, QUANT_TYPES
from .._ops import register_kernel
from .._precision import full_precision
from .quantize import check_nested_scales, check_scales, decode_scales
from .quantize_4bit import check_packed, decode_4bit

__all__ = ["check_product", "product_float32", "weight_scales"]

# Scales that share a scale of their own: fixed by the ops, which do not name it.
NESTED_BLOCKSIZE = 256
# Weights that are dequantized at once where the whole matrix must not be.
PIECE = 2**22


def check_product(
    op: str,
    name: str,
    A: Tensor,
    B: Tensor,
    shape: list[int],
    blocksize: int,
    transposed: bool = False,
    grouped: bool = False,
) -> int:
    """Checks the operands; returns the number of blocks of the weight, or of all weights."""
    check_dtype(op, name, A, *FLOATS)
    check(A.dim() >= 1, op, name, "of at least one dimension", "a scalar")
    fits = len(shape) == (3 if grouped else 2) and all(size >= 0 for size in shape)
    expected = "three sizes [E, N, K]" if grouped else "two sizes [N, K]"
    check(fits, op, "shapeB", expected, list(shape))
    terms = shape[-2] if transposed else shape[-1]
    expected = f"[..., {terms}] for shapeB {list(shape)}"
    check(A.shape[-1] == terms, op, name, expected, f"shape {list(A.shape)}")
    check(blocksize in BLOCKSIZES, op, "blocksize", f"one of {set(BLOCKSIZES)}", blocksize)
    check_device(op, "B", B, name, A)
    return check_packed(op, "B", B, math.prod(shape), blocksize)


def weight_scales(
    op: str,
    B: Tensor,
    blocks: int,
    quant_type: str,
    absmax: Tensor,
    absmax_8bit: Tensor | None,
    absmax_code: Tensor | None,
    absmax_offset: Tensor | None,
) -> Tensor:
    """Checks the format and the scales; returns the latter as float32 ``[blocks]``."""
    check(quant_type in QUANT_TYPES, op, "quant_type", "nf4 or fp4", repr(quant_type))
    if absmax_8bit is None:
        check_scales(op, B, blocks, absmax)
        return absmax.reshape(-1)
    for name, tensor in (("absmax_code", absmax_code), ("absmax_offset", absmax_offset)):
        check(tensor is not None, op, name, "given with absmax_8bit", None)
    offset = absmax_offset.to(torch.float32)
    nested = (absmax_8bit, absmax_code, absmax, offset, NESTED_BLOCKSIZE)
    check_nested_scales(op, B, blocks, *nested)
    return decode_scales(*nested)


def _pieces(
    B: Tensor, scales: Tensor, shape: list[int], blocksize: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Cuts a weight into rows, their packed codes and their scales.

    Each piece begins where a block and a byte do, so it is a 4-bit matrix of its own.
    """
    rows, columns = shape
    packed = B.reshape(-1).view(torch.uint8)
    unit = blocksize // math.gcd(blocksize, columns)
    step = unit * max(1, PIECE // (unit * columns))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        begin, end = first * columns, last * columns
        codes = packed[begin // 2 : (end + 1) // 2]
        yield slice(first, last), codes, scales[begin // blocksize : -(-end // blocksize)]


@register_kernel("_gemm_4bit_plain", "default")
@register_kernel("gemm_4bit", "default")
@torch.no_grad()
def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "gemm_4bit"
    blocks = check_product(op, "A", A, B, shapeB, blocksize)
    quantized = (absmax, absmax_8bit, absmax_code, absmax_offset)
    scales = weight_scales(op, B, blocks, quant_type, *quantized)
    if bias is not None:
        check_dtype(op, "bias", bias, A.dtype)
        check_device(op, "bias", bias, "A", A)
        check_shape(op, "bias", bias, [shapeB[0]])
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    weight = dequantize(B, scales, blocksize, quant_type, shapeB, A.dtype)
    with full_precision(A.device):
        return torch.nn.functional.linear(A, weight, bias)


@register_kernel("_gemm_4bit_dgrad_plain", "default")
@register_kernel("gemm_4bit_dgrad", "default")
@torch.no_grad()
def gemm_4bit_dgrad(
    grad: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "gemm_4bit_dgrad"
    blocks = check_product(op, "grad", grad, B, shapeB, blocksize, transposed=True)
    quantized = (absmax, absmax_8bit, absmax_code, absmax_offset)
    scales = weight_scales(op, B, blocks, quant_type, *quantized)
    columns = shapeB[1]
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    total = torch.zeros(rows.shape[0], columns, dtype=torch.float32, device=grad.device)
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    with full_precision(grad.device):
        for part, codes, part_scales in _pieces(B, scales, shapeB, blocksize) if columns else ():
            shape = [part.stop - part.start, columns]
            weight = dequantize(codes, part_scales, blocksize, quant_type, shape, grad.dtype)
            total += product_float32(rows[:, part], weight)
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """Returns ``a @ b`` of 16-bit or float32 matrices without rounding the sums to 16 bits."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@register_kernel("gemv_4bit", "default")
@torch.no_grad()
def gemv_4bit(
    A: Tensor, B: Tensor, shapeB: list[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    out = A.new_empty((*A.shape[:-1], shapeB[0] if len(shapeB) == 2 else 0))
    gemv_4bit_out(A, B, shapeB, absmax, code, blocksize, out)
    return out


@register_kernel("gemv_4bit.out", "default")
@torch.no_grad()
def gemv_4bit_out(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor,
) -> None:
    op = "gemv_4bit"
    blocks = check_product(op, "A", A, B, shapeB, blocksize)
    check_scales(op, B, blocks, absmax)
    check_dtype(op, "code", code, torch.float32)
    check_numel(op, "code", code, 16, "levels")
    check_device(op, "code", code, "A", A)
    check_dtype(op, "out", out, A.dtype)
    check_shape(op, "out", out, [*A.shape[:-1], shapeB[0]])
    check_device(op, "out", out, "A", A)
    columns, scales, table = shapeB[1], absmax.reshape(-1), code.reshape(-1)
    if columns == 0:
        out.zero_()
        return
    with full_precision(A.device):
        for part, codes, part_scales in _pieces(B, scales, shapeB, blocksize):
            shape = [part.stop - part.start, columns]
            weight = decode_4bit(codes, part_scales, blocksize, table, shape, A.dtype)
            out[..., part] = torch.nn.functional.linear(A, weight)
