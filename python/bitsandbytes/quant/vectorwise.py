# SPDX-License-Identifier: MIT
"""int8 quantization of vectors along a dimension, in the variants of the first releases.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 2.1.
"""

import torch
from torch import Tensor

__all__ = [
    "dequant_min_max",
    "vectorwise_dequant",
    "vectorwise_mm_dequant",
    "vectorwise_quant",
]

CODE_MAX = 127.0
TRUNCATED = 0.7  # of the largest magnitude, beyond which "truncated-vector" cuts values off
SYMMETRIC = ("linear", "vector", "row", "truncated-vector")
WITH_ZEROPOINT = ("zeropoint", "vector-zeropoint", "row-zeropoint")


def _refuse(name: str, quant_type: str, known: tuple[str, ...]) -> ValueError:
    return ValueError(f"{name}: quant_type must be one of {', '.join(known)}, got {quant_type}")


def vectorwise_quant(x: Tensor, dim: int = 1, quant_type: str = "vector") -> tuple[Tensor, Tensor]:
    """Quantizes vectors to int8, each with a scale of its own.

    Args:
        x: Floating-point tensor. It is not modified.
        dim: Dimension along which a vector lies.
        quant_type: ``"vector"`` or ``"row"``: the largest magnitude m of a vector has the code 127.
            ``"linear"``: the same with one m for the tensor. ``"truncated-vector"``: m is 0.7 of
            the largest magnitude, and what lies beyond is cut off. ``"zeropoint"``, and per vector
            ``"vector-zeropoint"`` and ``"row-zeropoint"``: the range from least to greatest takes
            255 codes.

    Returns:
        int8 codes and float32 m, with `dim` of size 1 or, for ``"linear"``, a scalar. For the
        zero-point variants float32 ``round(q * x)`` and the factor q.

    Raises:
        ValueError: If `quant_type` is not known.

    Example:
        >>> vectorwise_quant(torch.tensor([[1.0, -2.0], [0.5, 0.0]]))
        (tensor([[  64, -127],
                [ 127,    0]], dtype=torch.int8), tensor([[2.0000],
                [0.5000]]))
    """
    values = x.float()
    if quant_type in WITH_ZEROPOINT:
        if quant_type == "zeropoint":
            low, high = values.amin(), values.amax()
        else:
            low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
        reach = high - low
        factor = 255.0 / torch.where(reach == 0, 1.0, reach)
        zero = torch.round(low * factor)
        return torch.round(factor * values - zero) + zero, factor
    if quant_type not in SYMMETRIC:
        raise _refuse("vectorwise_quant", quant_type, SYMMETRIC + WITH_ZEROPOINT)
    magnitudes = values.abs()
    most = magnitudes.amax() if quant_type == "linear" else magnitudes.amax(dim, keepdim=True)
    if quant_type == "truncated-vector":
        most = most * TRUNCATED
        values = torch.clamp(values, -most, most)
    codes = torch.round(values * (CODE_MAX / most)).nan_to_num_(0.0, 0.0, 0.0)
    return codes.to(torch.int8), most


def vectorwise_dequant(xq: Tensor, max1: Tensor, quant_type: str = "vector") -> Tensor:
    """Returns the values ``xq / 127 * max1`` of codes of :func:`vectorwise_quant`.

    Args:
        xq: int8 codes.
        max1: float32 scales as :func:`vectorwise_quant` returns them.
        quant_type: Any of its symmetric variants.

    Returns:
        A float32 tensor of the shape of `xq`.

    Raises:
        ValueError: If `quant_type` is another one.

    Example:
        >>> vectorwise_dequant(torch.tensor([[127, 0]], dtype=torch.int8), torch.tensor([[2.0]]))
        tensor([[2., 0.]])
    """
    if quant_type not in SYMMETRIC:
        raise _refuse("vectorwise_dequant", quant_type, SYMMETRIC)
    return xq.float() / CODE_MAX * max1


def vectorwise_mm_dequant(
    xq: Tensor,
    S1: Tensor,
    S2: Tensor,
    dtype: torch.dtype = torch.half,
    quant_type: str = "vector",
) -> Tensor:
    """Returns the values of a product of codes of :func:`vectorwise_quant`.

    Args:
        xq: Product of codes ``[..., M, N]``, int32 or, with zero points, float32.
        S1: Scales of the left operand, ``[..., M, 1]`` or a scalar.
        S2: Scales of the right operand, ``[..., 1, N]`` or a scalar; ``[N, 1]`` for
            ``"vector-zeropoint"``.
        dtype: dtype of the result.
        quant_type: As both operands were quantized.

    Returns:
        A tensor of the shape of `xq`.

    Raises:
        ValueError: If `quant_type` is not known.

    Example:
        >>> scale = torch.tensor([[2.0]])
        >>> vectorwise_mm_dequant(torch.tensor([[16129]]), scale, scale, torch.float32)
        tensor([[4.]])
    """
    if xq.dim() == 2:
        S1 = S1.squeeze(0) if S1.dim() == 3 else S1
        S2 = S2.squeeze(0) if S2.dim() == 3 else S2
    product = xq.float()
    if quant_type in ("zeropoint", "row-zeropoint"):
        result = product / (S1 * S2)
    elif quant_type == "vector-zeropoint":
        result = product / S1 / S2.transpose(-2, -1)
    elif quant_type in SYMMETRIC:
        result = product * (S1 / CODE_MAX) * (S2 / CODE_MAX)
    else:
        raise _refuse("vectorwise_mm_dequant", quant_type, SYMMETRIC + WITH_ZEROPOINT)
    return result.to(dtype)


def dequant_min_max(
    xq: Tensor,
    A: Tensor,
    B: Tensor,
    SA: tuple[Tensor, Tensor],
    SB: Tensor,
    dtype: torch.dtype = torch.half,
) -> Tensor:
    """Returns the values of a product whose left operand was quantized from least to greatest.

    Args:
        xq: Product of codes ``[M, N]``.
        A: Left operand; not used.
        B: Right operand ``[N, K]``.
        SA: Least number of the left operand, and the width of its range.
        SB: Scales of the right operand, ``[N]``, ``[N, 1]`` or a scalar.
        dtype: dtype of the result.

    Returns:
        ``xq * SB / 127 * SA[1] / 127 + sum(B, 1) * (SA[0] + SA[1])``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> dequant_min_max(one * 127 * 127, one, one, (one * -2, one), one, torch.float32)
        tensor([[0.]])
    """
    scale = SB.t() if SB.dim() == 2 else SB
    offset = B.float().t().sum(0) * (SA[0] + SA[1])
    return (xq.float() * (scale / CODE_MAX) * (SA[1] / CODE_MAX) + offset).to(dtype)
