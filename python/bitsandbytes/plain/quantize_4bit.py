# SPDX-License-Identifier: MIT
"""4-bit blockwise quantization in plain PyTorch: the rules of docs/numerics.md, bit for bit."""

import math

import torch
import torch.nn.functional
from torch import Tensor

from .._checks import FLOATS, check, check_device, check_dtype, check_numel
from .._codes4 import BLOCKSIZES, QUANT_TYPES, STORAGES, levels, thresholds
from .._ops import register_kernel
from .quantize import (
    check_nested_scales,
    check_scales,
    count_thresholds,
    decode_scales,
    scale_blocks,
)

__all__ = ["check_packed", "decode_4bit"]

SIGN = 8


def _encode(scaled: Tensor, quant_type: str) -> Tensor:
    """Returns the int64 codes of scaled values: each counts the thresholds that it exceeds."""
    limits = thresholds(quant_type, scaled.device)
    above = torch.nextafter(limits, limits.new_tensor(torch.inf))  # x > t where x >= next float
    if quant_type == "nf4":
        return count_thresholds(above, scaled)
    rank = count_thresholds(above, scaled.abs())
    return (rank ^ ((rank & 2) << 1)) + SIGN * (scaled < 0)


def _check_common(op: str, blocksize: int, quant_type: str) -> None:
    check(blocksize in BLOCKSIZES, op, "blocksize", f"one of {BLOCKSIZES}", blocksize)
    check(quant_type in QUANT_TYPES, op, "quant_type", "nf4 or fp4", repr(quant_type))


def _check_storage(op: str, argument: str, dtype: torch.dtype) -> None:
    check(dtype in STORAGES, op, argument, "an integer or floating-point dtype", dtype)


def _packed_elements(n: int, storage: torch.dtype) -> int:
    return -(-((n + 1) // 2) // storage.itemsize)


@register_kernel("quantize_4bit", "default")
def quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    op = "quantize_4bit"
    _check_common(op, blocksize, quant_type)
    check_dtype(op, "A", A, *FLOATS)
    _check_storage(op, "quant_storage", quant_storage)
    n = A.numel()
    values = torch.nn.functional.pad(A.reshape(-1).float(), (0, n % 2))
    scaled, absmax = scale_blocks(values, blocksize)
    codes = _encode(scaled, quant_type).view(-1, 2)
    packed = (codes[:, 0] << 4 | codes[:, 1]).to(torch.uint8)
    missing = _packed_elements(n, quant_storage) * quant_storage.itemsize - packed.numel()
    packed = torch.nn.functional.pad(packed, (0, missing))
    return packed.view(quant_storage).view(-1, 1), absmax


@register_kernel("quantize_4bit.out", "default")
def quantize_4bit_out(
    A: Tensor,
    blocksize: int,
    quant_type: str,
    quant_storage: torch.dtype,
    *,
    out: Tensor,
    absmax: Tensor,
) -> None:
    op = "quantize_4bit"
    _check_common(op, blocksize, quant_type)
    check_dtype(op, "A", A, *FLOATS)
    _check_storage(op, "quant_storage", quant_storage)
    check_dtype(op, "out", out, quant_storage)
    check_numel(op, "out", out, _packed_elements(A.numel(), quant_storage), "two codes a byte")
    check_device(op, "out", out, "A", A)
    check_scales(op, A, -(-A.numel() // blocksize), absmax)
    packed, scales = quantize_4bit(A, blocksize, quant_type, quant_storage)
    out.copy_(packed.view(out.shape))
    absmax.copy_(scales.view(absmax.shape))


def check_packed(op: str, argument: str, packed: Tensor, n: int, blocksize: int) -> int:
    """Raises ValueError unless `packed` holds n codes; returns the number of their blocks."""
    _check_storage(op, argument, packed.dtype)
    blocks = -(-n // blocksize)
    # Some devices of the public package fill up the last block.
    least = _packed_elements(n, packed.dtype)
    most = _packed_elements(blocks * blocksize, packed.dtype)
    expected = f"of {least} elements ({n} codes)"
    fits = least <= packed.numel() <= most
    check(fits, op, argument, expected, f"shape {list(packed.shape)}")
    return blocks


def _check_dequantize(
    op: str,
    A: Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> int:
    """Checks all but the scales; returns the number of blocks."""
    _check_common(op, blocksize, quant_type)
    check(dtype in FLOATS, op, "dtype", "float16, bfloat16 or float32", dtype)
    check(all(size >= 0 for size in shape), op, "shape", "without negative sizes", list(shape))
    n = math.prod(shape)
    blocks = check_packed(op, "A", A, n, blocksize)
    if out is not None:
        check_dtype(op, "out", out, dtype)
        check_numel(op, "out", out, n, "as shape has")
        check_device(op, "out", out, "A", A)
    return blocks


def decode_4bit(
    A: Tensor, scales: Tensor, blocksize: int, table: Tensor, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Returns ``table[code] * scale`` of packed codes, for any table of sixteen levels."""
    n = math.prod(shape)
    packed = A.reshape(-1).view(torch.uint8)[: (n + 1) // 2].long()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:n]
    scales = scales.repeat_interleave(blocksize)[:n]
    return (table[codes] * scales).to(dtype).view(shape)


def _dequantize(
    A: Tensor,
    scales: Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return decode_4bit(A, scales, blocksize, levels(quant_type, A.device), shape, dtype)


@register_kernel("dequantize_4bit", "default")
def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    op = "dequantize_4bit"
    blocks = _check_dequantize(op, A, blocksize, quant_type, shape, dtype)
    check_scales(op, A, blocks, absmax)
    return _dequantize(A, absmax.reshape(-1), blocksize, quant_type, shape, dtype)


@register_kernel("dequantize_4bit.out", "default")
def dequantize_4bit_out(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    op = "dequantize_4bit"
    blocks = _check_dequantize(op, A, blocksize, quant_type, shape, dtype, out)
    check_scales(op, A, blocks, absmax)
    values = _dequantize(A, absmax.reshape(-1), blocksize, quant_type, shape, dtype)
    out.copy_(values.view(out.shape))


@register_kernel("dequantize_4bit_nested", "default")
def dequantize_4bit_nested(
    A: Tensor,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    op = "dequantize_4bit_nested"
    nested = (absmax_8bit, absmax_code, absmax, absmax_offset, nested_blocksize)
    blocks = _check_dequantize(op, A, blocksize, quant_type, shape, dtype)
    check_nested_scales(op, A, blocks, *nested)
    return _dequantize(A, decode_scales(*nested), blocksize, quant_type, shape, dtype)


@register_kernel("dequantize_4bit_nested.out", "default")
def dequantize_4bit_nested_out(
    A: Tensor,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    op = "dequantize_4bit_nested"
    nested = (absmax_8bit, absmax_code, absmax, absmax_offset, nested_blocksize)
    blocks = _check_dequantize(op, A, blocksize, quant_type, shape, dtype, out)
    check_nested_scales(op, A, blocks, *nested)
    values = _dequantize(A, decode_scales(*nested), blocksize, quant_type, shape, dtype)
    out.copy_(values.view(out.shape))
