# SPDX-License-Identifier: MIT
"""Quantiles of a whole tensor in plain PyTorch."""

import math

import torch
from torch import Tensor

from .._checks import FLOATS, check, check_dtype
from .._ops import register_kernel

__all__ = ["QUANTILES", "quantile_ranks"]

QUANTILES = 256
_LARGEST = 0x7FFFFFFF


def quantile_ranks(n: int, offset: float) -> list[int]:
    """Returns which element of `n` in ascending order each quantile is; halves are rounded up."""
    shares = (offset + k * (1.0 - 2.0 * offset) / (QUANTILES - 1) for k in range(QUANTILES))
    places = [share * (n - 1) for share in shares]
    return [min(math.floor(place) + (place - math.floor(place) >= 0.5), n - 1) for place in places]


@register_kernel("estimate_quantiles", "default")
def estimate_quantiles(A: Tensor, offset: float) -> Tensor:
    op = "estimate_quantiles"
    check_dtype(op, "A", A, *FLOATS)
    check(A.numel() > 0, op, "A", "of at least one element", f"shape {list(A.shape)}")
    check(0.0 <= offset <= 0.5, op, "offset", "0 to 0.5", offset)
    # Integers in the order of the floats, -0 before 0 and every NaN last.
    bits = A.reshape(-1).float().view(torch.int32)
    keys = torch.where(bits < 0, bits ^ _LARGEST, bits)
    keys = torch.where((bits & _LARGEST) > 0x7F800000, _LARGEST, keys)
    ranks = torch.tensor(quantile_ranks(A.numel(), offset), device=A.device)
    found = keys.sort().values[ranks]
    numbers = torch.where(found < 0, found ^ _LARGEST, found).view(torch.float32)
    return torch.where(found == _LARGEST, torch.nan, numbers)
