# SPDX-License-Identifier: MIT
"""Executable specification of 4-bit blockwise quantization, in NumPy and without bitsandbytes.

Scaled values are float32 numbers, as on every device; comparisons are made in float64, where they
are exact. Two codes share a byte: the first lies in its upper half.
"""

from statistics import NormalDist

import numpy as np

from .codes import _equal_cells, midpoints, round_to, scale

__all__ = [
    "dequantize",
    "encode",
    "fp4_levels",
    "levels",
    "nf4_levels",
    "pack",
    "quantize",
    "unpack",
]

# What the CUDA kernels of the public package compare magnitudes with, as float32. The levels above
# the thresholds ascend in the order of these codes.
FP4_THRESHOLDS = np.array(
    [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32
)
FP4_ORDER = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)


def nf4_levels() -> np.ndarray:
    """Returns the NormalFloat4 levels float32 [16], ascending.

    Quantiles of the normal distribution at equally spaced probabilities: eight above zero, seven
    below, and zero itself, divided by the largest (arXiv:2305.14314, section 3).
    """

    def quantiles(count):
        probabilities = _equal_cells(0.9677083, 0.5, count)[:-1]
        return [NormalDist().inv_cdf(p) for p in probabilities]

    values = np.array([*quantiles(9), 0.0, *(-q for q in quantiles(8))], np.float32)
    return np.sort(values) / values.max()


def fp4_levels() -> np.ndarray:
    """Returns the FP4 levels float32 [16] by code: sign, two bits of exponent, one of mantissa."""
    codes = np.arange(16)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    twelfths = np.where(exponent == 0, mantissa / 16, 2.0 ** (4 - exponent) * (1 + mantissa / 2))
    values = twelfths.astype(np.float32) / np.float32(12)
    return np.where(codes >= 8, -values, values)


def levels(name: str) -> np.ndarray:
    """Returns the levels float32 [16] of "nf4" or "fp4" by code."""
    return {"nf4": nf4_levels, "fp4": fp4_levels}[name]()


def encode(name: str, s: np.ndarray) -> np.ndarray:
    """Returns the code uint8 of each scaled value: how many thresholds it exceeds, NaN none."""
    s = np.asarray(s, np.float32)
    if name == "nf4":
        middle = midpoints(nf4_levels()).astype(np.float64)
        return np.where(np.isnan(s), 0, np.searchsorted(middle, s, side="left")).astype(np.uint8)
    rank = np.searchsorted(FP4_THRESHOLDS.astype(np.float64), np.abs(s), side="left")
    return FP4_ORDER[np.where(np.isnan(s), 0, rank)] + np.where(s < 0, 8, 0).astype(np.uint8)


def pack(codes: np.ndarray) -> np.ndarray:
    """Returns bytes of two codes each; the number of codes is even."""
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: np.ndarray, n: int) -> np.ndarray:
    """Returns the first n codes in bytes of two codes each."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


def quantize(name: str, a: np.ndarray, blocksize: int):
    """Returns packed codes uint8 [ceil(n / 2)] and absmax float32 [ceil(n / blocksize)].

    Where the number of elements is odd, a zero is quantized with the last block.
    """
    a = np.asarray(a, np.float32).reshape(-1)
    absmax, s = scale(np.pad(a, (0, a.size % 2)), blocksize)
    return pack(encode(name, s)), absmax


def dequantize(name, packed, absmax, blocksize: int, n: int, dtype: str = "float32") -> np.ndarray:
    """Returns level * absmax in float32, rounded once to `dtype`; float32 numbers [n]."""
    scales = np.repeat(np.asarray(absmax, np.float32), blocksize)[:n]
    with np.errstate(all="ignore"):
        return round_to(levels(name)[unpack(packed, n)] * scales, dtype)
