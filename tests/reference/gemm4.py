# SPDX-License-Identifier: MIT
"""Executable specification of products with a 4-bit weight, in NumPy and without bitsandbytes.

The weight is defined to the last bit; products and sums are computed in float64.
"""

import numpy as np

from . import codes4

__all__ = ["closeness", "grouped", "nested_scales", "product", "weight", "weight_rounding"]

SIGNIFICAND = {"float32": 24, "float16": 11, "bfloat16": 8}


def nested_scales(codes, code, absmax, offset, blocksize: int = 256) -> np.ndarray:
    """Returns code[codes] * absmax + offset float32 [blocks], with two roundings."""
    codes = np.asarray(codes).reshape(-1)
    scales = np.repeat(np.asarray(absmax, np.float32), blocksize)[: codes.size]
    return np.asarray(code, np.float32)[codes] * scales + np.float32(offset)


def weight(name: str, packed, absmax, blocksize: int, shape, dtype: str) -> np.ndarray:
    """Returns the weight float64 of `shape`: level * absmax, rounded to `dtype`."""
    packed = np.asarray(packed).reshape(-1)
    n = int(np.prod(shape, dtype=np.int64))
    values = codes4.dequantize(name, packed, absmax, blocksize, n, dtype)
    return values.reshape(shape).astype(np.float64)


def product(a, b, bias=None):
    """Returns a b + bias for matrices, and the sums of the magnitudes of its terms."""
    a, b = np.float64(a), np.float64(b)
    result, size = a @ b, np.abs(a) @ np.abs(b)
    if bias is not None:
        result, size = result + np.float64(bias), size + np.abs(np.float64(bias))
    return result, size


def grouped(function, a, weights, ends, *others):
    """Returns one result of ``function(rows, weight, ...)`` for all groups of rows, one below the
    other: those of group i end before row ends[i]. Rows of no group are zeros.

    `others` hold what the function takes besides, by group, or are None.
    """
    out = np.zeros((len(a), weights.shape[2]))
    first = 0
    for i, end in enumerate(ends):
        rest = [None if other is None else other[i] for other in others]
        out[first:end] = function(a[first:end], weights[i], *rest)
        first = end
    return out


def closeness(result, size, terms: int, dtype: str) -> np.ndarray:
    """Returns how far a sum of `terms`, made in float32 and rounded to `dtype`, may be off.

    Half a unit in the last place of the result, or of float16's smallest numbers (2^-24), and
    roundings of partial sums, which add up as a random walk does.
    """
    rounding = np.abs(result) * 2.0 ** -SIGNIFICAND[dtype] + 2.0**-25
    return rounding + size * 2.0**-24 * (2 + 4 * np.sqrt(terms))


def sum_rounding(size, dtype: str):
    """Returns how far a product may be off if its sum is rounded to `dtype` before it is finished.

    As those of torch on a GPU are, to which the bias is added later. `size`: of all magnitudes.
    """
    return 0.0 if dtype == "float32" else size * 2.0 ** -SIGNIFICAND[dtype]


def weight_rounding(a, b, dtype: str):
    """Returns how far a product may be off for weights of which `dtype` holds a rounding.

    Each may be off by half a unit in the last place, up or down: a random walk, of at most twice
    its steps.
    """
    if dtype == "float32":
        return 0.0
    steps = np.sqrt(np.square(np.float64(a)) @ np.square(np.float64(b)))
    return 2 * 2.0 ** -SIGNIFICAND[dtype] * steps
