# SPDX-License-Identifier: MIT
"""Executable specification of LLM.int8(), in NumPy and without bitsandbytes.

Codes are defined in float32, because every device must choose the same ones; everything that is
rounded at the end is computed in float64.
"""

import numpy as np

__all__ = [
    "closeness",
    "dequantize",
    "gradients",
    "linear",
    "matmul",
    "mm_dequant",
    "quantize",
]


def quantize(a: np.ndarray, threshold: float = 0.0):
    """Returns codes int8 [rows, K], statistics float32 [rows] and outlier columns or None.

    Written element by element, as the definition reads.
    """
    a = np.asarray(a, np.float32)
    rows, columns = a.shape
    limit = np.float32(threshold)
    outlier = np.zeros((rows, columns), bool)
    if threshold > 0:
        outlier = np.abs(a) >= limit
    outlier_column = outlier.any(axis=0)
    codes = np.zeros((rows, columns), np.int8)
    stats = np.zeros(rows, np.float32)
    for i in range(rows):
        counted = [abs(a[i, j]) for j in range(columns) if not outlier[i, j]]
        if any(np.isnan(value) for value in counted):
            stats[i] = np.nan
        elif counted:
            stats[i] = max(counted)
        with np.errstate(over="ignore", divide="ignore"):
            scale = np.float32(127) / stats[i]
        if not np.isfinite(stats[i]) or not np.isfinite(scale):
            continue
        for j in range(columns):
            if not outlier_column[j]:
                codes[i, j] = np.rint(a[i, j] * scale)  # ties go to even
    return codes, stats, np.flatnonzero(outlier_column) if threshold > 0 else None


def dequantize(codes: np.ndarray, stats: np.ndarray) -> np.ndarray:
    """Returns the values [rows, K] of codes: codes * stats / 127."""
    return codes.astype(np.float64) * stats.astype(np.float64)[:, None] / 127


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the exact integers [M, N] of a b^T."""
    return a.astype(np.int64) @ b.astype(np.int64).T


def mm_dequant(product, row_stats, col_stats, bias=None) -> np.ndarray:
    """Returns product * row_stats * col_stats / 127^2 + bias."""
    row_stats, col_stats = np.float64(row_stats), np.float64(col_stats)
    with np.errstate(invalid="ignore"):
        result = product * row_stats[:, None] * col_stats / (127 * 127)
    return result if bias is None else result + np.float64(bias)


def linear(a, codes, stats, bias=None, threshold: float = 0.0) -> np.ndarray:
    """Returns the layer: int8 product of ordinary columns plus exact product of outlier columns."""
    a_codes, a_stats, outliers = quantize(a, threshold)
    result = mm_dequant(matmul(a_codes, codes), a_stats, stats)
    if outliers is not None:
        result += np.float64(a)[:, outliers] @ dequantize(codes, stats)[:, outliers].T
    return result if bias is None else result + np.float64(bias)


def gradients(grad, a, codes, stats):
    """Returns the gradients of a, of the weight and of the bias."""
    grad = np.float64(grad)
    return grad @ dequantize(codes, stats), grad.T @ np.float64(a), grad.sum(axis=0)


def closeness(significand: int, result, *terms) -> np.ndarray:
    """Returns how far a sum of `terms`, computed in float32 and rounded once, may be from `result`.

    Eight float32 roundings of the terms, and half a unit in the last place of the result in a
    format with `significand` bits (24, 11 or 8), or of float16's smallest numbers (2^-24).
    """
    size = sum(np.abs(np.float64(term)) for term in terms)
    return np.abs(result) * 2.0**-significand + size * 8 * 2.0**-24 + 2.0**-25
