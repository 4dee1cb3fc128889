# SPDX-License-Identifier: MIT
"""8-bit quantization with one scale for a whole tensor, or with none."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import FLOATS, check_output
from .codes import default_code

__all__ = ["dequantize", "dequantize_no_absmax", "quantize", "quantize_no_absmax"]


def quantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """Replaces every element by the index of the nearest level, without scaling it.

    Args:
        A: float32, float16 or bfloat16 tensor of any shape. Numbers beyond the levels take the
            lowest or the highest, NaN takes code 0.
        code: float32 levels ``[1 to 256]`` of any range, in any order.
        out: uint8 tensor of A's shape that receives the codes.

    Returns:
        uint8 codes of A's shape; `out` if given.

    Raises:
        ValueError: A is not of a floating dtype named above, or `out` does not fit.
        RuntimeError: `code` does not fit.

    Example:
        >>> quantize_no_absmax(torch.tensor([-5.0, 0.9, 2.1]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([0, 1, 2], dtype=torch.uint8)
    """
    name = "quantize_no_absmax"
    if A.dtype not in FLOATS:
        raise ValueError(f"{name}: A must be float32, float16 or bfloat16, got {A.dtype}")
    check_output(name, "out", out, A.shape, torch.uint8)
    codes = torch.ops.bitsandbytes.quantize_no_absmax(A, code.to(A.device))
    return codes if out is None else out.copy_(codes)


def dequantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """Looks codes up in a table of levels.

    Args:
        A: uint8 codes of any shape.
        code: float32 levels ``[1 to 256]``. Codes beyond its end become NaN.
        out: float32 tensor of A's shape for the result.

    Returns:
        float32 ``code[A]``; `out` if given.

    Raises:
        ValueError: A is not uint8, or `out` does not fit.
        RuntimeError: `code` does not fit.

    Example:
        >>> dequantize_no_absmax(torch.tensor([2, 0], dtype=torch.uint8), torch.tensor([3.0, 4, 5]))
        tensor([5., 3.])
    """
    name = "dequantize_no_absmax"
    if A.dtype != torch.uint8:
        raise ValueError(f"{name}: A must be uint8, got {A.dtype}")
    check_output(name, "out", out, A.shape, torch.float32)
    blocksize = max(A.numel(), 1)  # one block, whose scale is 1
    scale = torch.ones(min(A.numel(), 1), device=A.device)
    levels = torch.ops.bitsandbytes.dequantize_blockwise(
        A, scale, code.to(A.device), blocksize, torch.float32
    )
    return levels if out is None else out.copy_(levels)


def quantize(
    A: Tensor, code: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Quantizes a tensor to 8-bit codes with one scale, its absolute maximum.

    Args:
        A: float32, float16 or bfloat16 tensor of any shape.
        code: float32 levels ``[1 to 256]``. Default: the signed dynamic map.
        out: uint8 tensor of A's shape that receives the codes.

    Returns:
        uint8 codes of A's shape, and the pair ``(absmax, code)`` that :func:`dequantize` needs;
        `absmax` is a 0-dim float32.

    Raises:
        ValueError: A is not of a floating dtype named above, or `out` does not fit.

    Example:
        >>> codes, state = quantize(torch.tensor([0.0, 5.0]))
        >>> dequantize(codes, state)
        tensor([0., 5.])
    """
    if A.dtype not in FLOATS:
        raise ValueError(f"quantize: A must be float32, float16 or bfloat16, got {A.dtype}")
    check_output("quantize", "out", out, A.shape, torch.uint8)
    code = default_code("dynamic", A.device).clone() if code is None else code.to(A.device)
    values = A.float()
    absmax = values.abs().amax() if A.numel() else values.new_zeros(())
    return quantize_no_absmax(values / absmax, code, out), (absmax, code)


def dequantize(
    A: Tensor,
    quant_state: Sequence[Tensor] | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    *,
    state: Sequence[Tensor] | None = None,
) -> Tensor:
    """Turns the codes of :func:`quantize` back into numbers.

    Args:
        A: uint8 codes of any shape.
        quant_state: The pair ``(absmax, code)``; the next two arguments are then ignored.
        absmax: The scale, when there is no state.
        code: float32 levels ``[1 to 256]``. Default: the signed dynamic map.
        out: float32 tensor of A's shape that receives the levels, *before* they are scaled.
        state: Name of `quant_state` in bitsandbytes 0.42 to 0.49.

    Returns:
        float32 ``code[A] * absmax``, a new tensor.

    Raises:
        AssertionError: Neither a state nor `absmax` was given.
        ValueError: A is not uint8, or `out` does not fit.

    Example:
        >>> codes, (absmax, code) = quantize(torch.ones(2))
        >>> dequantize(codes, absmax=absmax)
        tensor([1., 1.])
    """
    if state is not None:
        quant_state = state
    if quant_state is not None:
        absmax, code = quant_state
    if absmax is None:
        raise AssertionError("dequantize: quant_state or absmax must be given, got neither")
    check_output("dequantize", "out", out, A.shape, torch.float32)
    code = default_code("dynamic", A.device) if code is None else code
    levels = dequantize_no_absmax(A, code)
    result = levels * absmax.to(A.device)
    if out is not None:
        out.copy_(levels)
    return result
