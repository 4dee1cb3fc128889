# SPDX-License-Identifier: MIT
"""8-bit blockwise quantization in plain PyTorch: the rules of docs/numerics.md, bit for bit."""

import torch
import torch.nn.functional
from torch import Tensor

from .._checks import FLOATS, check, check_device, check_dtype, check_numel
from .._ops import register_kernel

__all__ = [
    "check_nested_scales",
    "check_scales",
    "code_thresholds",
    "count_thresholds",
    "decode_scales",
    "dequantize_blocks",
    "encode",
    "full_code",
    "quantize_blocks",
    "scale_blocks",
]

LEVELS = 256


def code_thresholds(code: Tensor) -> Tensor:
    """Returns the 255 decision thresholds of a 256-level code: code = thresholds <= x, counted.

    A threshold is the float32 midpoint of two levels; on the midpoint itself the even code wins,
    so thresholds below an odd code are moved up by one float.
    """
    midpoints = (code[:-1] + code[1:]) * 0.5
    odd = torch.arange(LEVELS - 1, device=code.device) % 2 == 1
    return torch.where(odd, midpoints, torch.nextafter(midpoints, midpoints.new_tensor(torch.inf)))


def count_thresholds(thresholds: Tensor, x: Tensor) -> Tensor:
    """Counts thresholds <= x by halving steps, as the native kernels do; NaN gives 0.

    Args:
        thresholds: Ascending, one less than a power of two of them.
        x: Of the same dtype.

    Returns:
        int64 counts of x's shape.
    """
    codes = torch.zeros(x.shape, dtype=torch.long, device=x.device)
    step = (thresholds.numel() + 1) // 2
    while step:
        codes += step * (x >= thresholds[codes + (step - 1)])
        step //= 2
    return codes


def full_code(code: Tensor) -> Tensor:
    """Returns a flat code of 256 levels: a shorter one ends in NaN, which no number is near to."""
    code = code.reshape(-1)
    return torch.nn.functional.pad(code, (0, LEVELS - code.numel()), value=torch.nan)


def encode(values: Tensor, code: Tensor, rand: Tensor | None = None, offset: int = 0) -> Tensor:
    """Encodes a flat float32 tensor as it is.

    Args:
        values: float32 ``[n]``.
        code: float32 ``[256]``, in any order.
        rand: float32 ``[m]`` in [0, 1) for stochastic rounding; element i takes number
            ``(i + offset) % m``.
        offset: See `rand`.

    Returns:
        uint8 codes ``[n]`` of the nearest levels, or of one of the two that a value lies between.
    """
    levels, codes = torch.sort(code, stable=True)  # NaN last
    found = count_thresholds(code_thresholds(levels), values)
    if rand is not None:
        where = (torch.arange(values.numel(), device=values.device) + offset) % rand.numel()
        found = _round_stochastic(levels, found, values, rand[where])
    return codes.to(torch.uint8)[found]


def _round_stochastic(levels: Tensor, found: Tensor, x: Tensor, r: Tensor) -> Tensor:
    nearest = levels[found]
    upper = levels[(found + 1).clamp(max=LEVELS - 1)]
    lower = levels[(found - 1).clamp(min=0)]
    up = (x > nearest) & (found < LEVELS - 1) & (r >= (upper - x) / (upper - nearest))
    down = (x < nearest) & (found > 0) & (r >= (x - lower) / (nearest - lower))
    return found + up.long() - down.long()


def scale_blocks(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Divides a flat float32 tensor by the absmax of its blocks, as products with reciprocals.

    Returns:
        float32 scaled values ``[n]`` and absmax ``[ceil(n / blocksize)]``.
    """
    n = values.numel()
    blocks = -(-n // blocksize)
    padded = torch.nn.functional.pad(values, (0, blocks * blocksize - n)).view(blocks, blocksize)
    absmax = padded.abs().amax(dim=1) if n else padded.new_empty(0)
    return (padded * (1.0 / absmax)[:, None]).reshape(-1)[:n], absmax


def quantize_blocks(
    values: Tensor, code: Tensor, blocksize: int, keep_sign: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantizes a flat float32 tensor with an ascending code.

    Args:
        values: float32 ``[n]``.
        code: float32 ``[256]``, ascending.
        blocksize: Elements that share one absmax.
        keep_sign: A negative value never becomes zero (states of 8-bit optimizers).

    Returns:
        uint8 codes ``[n]`` and float32 absmax ``[ceil(n / blocksize)]``.
    """
    scaled, absmax = scale_blocks(values, blocksize)
    codes = count_thresholds(code_thresholds(code), scaled)
    if keep_sign:
        lost = scaled.signbit() & ~code[codes].signbit() & (codes > 0)
        codes = codes - lost.long()
    return codes.to(torch.uint8), absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """Returns ``code[codes] * absmax`` in float32 for flat uint8 `codes`."""
    scales = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return code[codes.long()] * scales


def _check_code(op: str, A: Tensor, code: Tensor) -> None:
    check_dtype(op, "code", code, torch.float32)
    check(1 <= code.numel() <= LEVELS, op, "code", f"of 1 to {LEVELS} elements", code.numel())
    check_device(op, "code", code, "A", A)


def _check_quantize(op: str, A: Tensor, code: Tensor, blocksize: int) -> None:
    check_dtype(op, "A", A, *FLOATS)
    check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check_code(op, A, code)


@register_kernel("quantize_blockwise", "default")
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    _check_quantize("quantize_blockwise", A, code, blocksize)
    scaled, absmax = scale_blocks(A.reshape(-1).float(), blocksize)
    return encode(scaled, full_code(code)).view(A.shape), absmax


@register_kernel("quantize_blockwise_stochastic", "default")
def quantize_blockwise_stochastic(
    A: Tensor, code: Tensor, blocksize: int, rand: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    op = "quantize_blockwise_stochastic"
    _check_quantize(op, A, code, blocksize)
    check_dtype(op, "rand", rand, torch.float32)
    check(rand.numel() >= 1, op, "rand", "of at least one element", rand.numel())
    check_device(op, "rand", rand, "A", A)
    expected = f"0 to {rand.numel() - 1} for a rand of {rand.numel()} elements"
    check(0 <= offset < rand.numel(), op, "offset", expected, offset)
    scaled, absmax = scale_blocks(A.reshape(-1).float(), blocksize)
    return encode(scaled, full_code(code), rand.reshape(-1), offset).view(A.shape), absmax


@register_kernel("quantize_no_absmax", "default")
def quantize_no_absmax(A: Tensor, code: Tensor) -> Tensor:
    check_dtype("quantize_no_absmax", "A", A, *FLOATS)
    _check_code("quantize_no_absmax", A, code)
    return encode(A.reshape(-1).float(), full_code(code)).view(A.shape)


@register_kernel("quantize_blockwise.out", "default")
def quantize_blockwise_out(
    A: Tensor, code: Tensor, blocksize: int, *, out: Tensor, absmax: Tensor
) -> None:
    op = "quantize_blockwise"
    _check_quantize(op, A, code, blocksize)
    check_dtype(op, "out", out, torch.uint8)
    check_numel(op, "out", out, A.numel(), "as A")
    check_device(op, "out", out, "A", A)
    check_dtype(op, "absmax", absmax, torch.float32)
    check_numel(op, "absmax", absmax, -(-A.numel() // blocksize), "one per block")
    check_device(op, "absmax", absmax, "A", A)
    codes, scales = quantize_blockwise(A, code, blocksize)
    out.copy_(codes.view(out.shape))
    absmax.copy_(scales.view(absmax.shape))


def decode_scales(
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    nested_blocksize: int,
) -> Tensor:
    """Returns the float32 scales behind their 8-bit codes, flat."""
    codes, code = absmax_8bit.reshape(-1), absmax_code.reshape(-1)
    shifted = dequantize_blocks(codes, absmax.reshape(-1), code, nested_blocksize)
    return shifted + absmax_offset.reshape(())


def check_scales(op: str, A: Tensor, blocks: int, absmax: Tensor) -> None:
    """Raises ValueError unless `absmax` holds one float32 per block, beside A."""
    check_dtype(op, "absmax", absmax, torch.float32)
    check_numel(op, "absmax", absmax, blocks, "one per block")
    check_device(op, "absmax", absmax, "A", A)


def check_nested_scales(
    op: str,
    A: Tensor,
    blocks: int,
    absmax_8bit: Tensor,
    absmax_code: Tensor,
    absmax: Tensor,
    absmax_offset: Tensor,
    nested_blocksize: int,
) -> None:
    """Raises ValueError unless these are quantized scales of `blocks` blocks, beside A."""
    check(nested_blocksize > 0, op, "nested_blocksize", "positive", nested_blocksize)
    check_dtype(op, "absmax_8bit", absmax_8bit, torch.uint8)
    check_numel(op, "absmax_8bit", absmax_8bit, blocks, "one per block")
    check_dtype(op, "absmax_code", absmax_code, torch.float32)
    check_numel(op, "absmax_code", absmax_code, LEVELS, "levels")
    check_dtype(op, "absmax", absmax, torch.float32)
    check_numel(op, "absmax", absmax, -(-blocks // nested_blocksize), "one per block of scales")
    check_dtype(op, "absmax_offset", absmax_offset, torch.float32)
    check_numel(op, "absmax_offset", absmax_offset, 1, "a number")
    for name, tensor in (
        ("absmax_8bit", absmax_8bit),
        ("absmax_code", absmax_code),
        ("absmax", absmax),
        ("absmax_offset", absmax_offset),
    ):
        check_device(op, name, tensor, "A", A)


def _check_dequantize(
    op: str, A: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor | None = None
) -> None:
    check_dtype(op, "A", A, torch.uint8)
    check(blocksize > 0, op, "blocksize", "positive", blocksize)
    _check_code(op, A, code)
    check(dtype in FLOATS, op, "dtype", "float16, bfloat16 or float32", dtype)
    if out is not None:
        check_dtype(op, "out", out, dtype)
        check_numel(op, "out", out, A.numel(), "as A")
        check_device(op, "out", out, "A", A)


def _dequantize(
    A: Tensor, scales: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    values = dequantize_blocks(A.reshape(-1), scales, full_code(code), blocksize)
    return values.view(A.shape).to(dtype)


@register_kernel("dequantize_blockwise", "default")
def dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    op = "dequantize_blockwise"
    _check_dequantize(op, A, code, blocksize, dtype)
    check_scales(op, A, -(-A.numel() // blocksize), absmax)
    return _dequantize(A, absmax.reshape(-1), code, blocksize, dtype)


@register_kernel("dequantize_blockwise.out", "default")
def dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    op = "dequantize_blockwise"
    _check_dequantize(op, A, code, blocksize, dtype, out)
    check_scales(op, A, -(-A.numel() // blocksize), absmax)
    values = _dequantize(A, absmax.reshape(-1), code, blocksize, dtype)
    out.copy_(values.view(out.shape))


@register_kernel("dequantize_blockwise_nested", "default")
def dequantize_blockwise_nested(
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
    nested = (absmax_8bit, absmax_code, absmax, absmax_offset, nested_blocksize)
    _check_dequantize(op, A, code, blocksize, dtype)
    check_nested_scales(op, A, -(-A.numel() // blocksize), *nested)
    return _dequantize(A, decode_scales(*nested), code, blocksize, dtype)


@register_kernel("dequantize_blockwise_nested.out", "default")
def dequantize_blockwise_nested_out(
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
    nested = (absmax_8bit, absmax_code, absmax, absmax_offset, nested_blocksize)
    _check_dequantize(op, A, code, blocksize, dtype, out)
    check_nested_scales(op, A, -(-A.numel() // blocksize), *nested)
    values = _dequantize(A, decode_scales(*nested), code, blocksize, dtype)
    out.copy_(values.view(out.shape))
