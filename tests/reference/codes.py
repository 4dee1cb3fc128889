# SPDX-License-Identifier: MIT
"""Executable specification of 8-bit blockwise quantization, in NumPy and without bitsandbytes.

A code is a table of at most 256 float32 levels. Every device must choose the same code, so the
decision is defined on float32 numbers; the comparisons themselves are made in float64, where they
are exact.
"""

import numpy as np

__all__ = [
    "dequantize",
    "dynamic_map",
    "encode",
    "linear_map",
    "midpoints",
    "quantiles",
    "quantize",
    "round_stochastic",
    "round_to",
    "scale",
]

LEVELS = 256


def _equal_cells(start: float, end: float, count: int) -> np.ndarray:
    """Returns `count` equally spaced points: float64 [count] of float32 values.

    The step is rounded to float32; the first half counts up from the start, the rest down from
    the end, each point rounded once.
    """
    f32 = np.float32
    start, end = f32(start), f32(end)
    step = np.float64((end - start) / f32(count - 1))
    k = np.arange(count)
    up = np.float64(start) + step * k
    down = np.float64(end) - step * (count - 1 - k)
    return np.where(k < count // 2, up, down).astype(f32).astype(np.float64)


def dynamic_map(signed: bool, exponents: int = 7, bits: int = 8) -> np.ndarray:
    """Returns the dynamic map float32 [256]: decades of midpoints of equal cells of [0.1, 1]."""
    f32 = np.float32
    values = []

    def add_decade(cells, power):
        edges = _equal_cells(0.1, 1.0, cells + 1).astype(f32)
        centres = (edges[:-1] + edges[1:]) / f32(2)
        values.extend(centres * f32(10.0**power))

    fraction = bits - 1
    for i in range(exponents):
        cells = int(2.0 ** (i + fraction - exponents + (0 if signed else 1)))
        if cells > 0:
            add_decade(cells, i - exponents + 1)
    extra = int(2.0 ** (fraction - exponents)) - 1
    if extra > 0:
        add_decade(extra, 0)
    if signed:
        values.extend([-value for value in values])
    values.extend([f32(0), f32(1)])
    assert len(values) == 2**bits
    values.extend([f32(0)] * (LEVELS - len(values)))
    return np.sort(np.array(values, f32))


def linear_map(signed: bool, bits: int = 8, add_zero: bool = True) -> np.ndarray:
    """Returns equally spaced levels float32 [256], padded with zeros in the middle."""
    count = 2**bits - (1 if signed and (add_zero or bits < 8) else 0)
    levels = _equal_cells(-1.0 if signed else 0.0, 1.0, count).astype(np.float32)
    padding = np.zeros(LEVELS - count, np.float32)
    return np.concatenate([levels[: count // 2], padding, levels[count // 2 :]])


def midpoints(levels: np.ndarray) -> np.ndarray:
    """Returns the float32 midpoints [255] of neighbouring levels."""
    levels = np.asarray(levels, np.float32)
    return (levels[:-1] + levels[1:]) * np.float32(0.5)


def ordered(levels: np.ndarray):
    """Returns the levels in ascending order, and the code of each; NaN is no level."""
    levels = np.asarray(levels, np.float32)
    codes = np.argsort(levels, kind="stable")
    codes = codes[~np.isnan(levels[codes])]
    return levels[codes], codes


def encode(levels: np.ndarray, s: np.ndarray, keep_sign: bool = False) -> np.ndarray:
    """Returns the code uint8 of each scaled value for 1 to 256 levels.

    Beyond a midpoint the upper level is nearer, on a midpoint the one at an even place of the
    ascending order is taken, NaN is at the first place. With `keep_sign` (states of optimizers) a
    value with a minus sign never takes a level without one: it takes the level below.
    """
    s = np.asarray(s)
    levels, codes = ordered(levels)
    middle = midpoints(levels).astype(np.float64)
    places = np.searchsorted(middle, s, side="left")  # midpoints < s
    if middle.size:
        tie = np.minimum(places, middle.size - 1)
        places = places + (np.equal(middle[tie], s) & (tie % 2 == 1))
    places = np.where(np.isnan(s), 0, places)
    if keep_sign:
        lost = np.signbit(s) & ~np.signbit(levels[places]) & (places > 0)
        places = places - lost
    return codes[places].astype(np.uint8)


def round_stochastic(levels: np.ndarray, s: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Returns the codes uint8 of scaled values float32 that numbers r in [0, 1) choose.

    The nearest level is left for the one on the other side of s when r reaches 1 minus the share
    that s has gone towards it. Differences and quotient are rounded to float32.
    """
    chosen = encode(levels, s)
    levels, codes = ordered(levels)
    place = np.zeros(LEVELS, np.int64)
    place[codes] = np.arange(codes.size)
    nearest = place[chosen]
    side = (s > levels[nearest]).astype(np.int64) - (s < levels[nearest])
    other = np.clip(nearest + side, 0, levels.size - 1)
    with np.errstate(all="ignore"):
        rest = np.abs(levels[other] - s) / np.abs(levels[other] - levels[nearest])
        moves = (other != nearest) & (r >= rest)
    return codes[np.where(moves, other, nearest)].astype(np.uint8)


def quantiles(a: np.ndarray, offset: float) -> np.ndarray:
    """Returns 256 quantiles float32: elements of a in ascending order, NaN last."""
    a = np.sort(np.asarray(a, np.float32).reshape(-1))
    places = (offset + np.arange(256) * (1 - 2 * offset) / 255) * (a.size - 1)
    return a[np.floor(places).astype(np.int64) + (places - np.floor(places) >= 0.5)]


def scale(a: np.ndarray, blocksize: int):
    """Returns absmax float32 [ceil(n / blocksize)] and the scaled values float32 [n].

    A value is multiplied by the reciprocal of its block's absmax; both operations are rounded to
    float32. NaN is the greatest magnitude. In a block of zeros every product is NaN.
    """
    a = np.asarray(a, np.float32).reshape(-1)
    absmax = np.array(
        [np.max(np.abs(a[i : i + blocksize])) for i in range(0, a.size, blocksize)], np.float32
    )
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / absmax
        return absmax, a * np.repeat(inverse, blocksize)[: a.size]


def quantize(levels: np.ndarray, a: np.ndarray, blocksize: int, keep_sign: bool = False):
    """Returns codes uint8 of a's shape and absmax float32 [ceil(n / blocksize)]."""
    absmax, s = scale(a, blocksize)
    return encode(levels, s, keep_sign).reshape(np.shape(a)), absmax


def dequantize(levels, codes, absmax, blocksize: int, dtype: str = "float32") -> np.ndarray:
    """Returns level * absmax in float32, rounded once to `dtype`; float32 numbers, codes' shape."""
    codes = np.asarray(codes)
    scales = np.repeat(np.asarray(absmax, np.float32), blocksize)[: codes.size]
    with np.errstate(all="ignore"):
        values = np.asarray(levels, np.float32)[codes.reshape(-1)] * scales
    return round_to(values.reshape(codes.shape), dtype)


def round_to(a: np.ndarray, dtype: str) -> np.ndarray:
    """Returns float32 numbers rounded to the nearest of a narrower format, ties to even."""
    a = np.asarray(a, np.float32)
    with np.errstate(all="ignore"):
        if dtype == "float16":
            return a.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        word = np.ascontiguousarray(a).view(np.uint32)
        upper = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(
            16
        )
        return np.where(np.isnan(a), a, (upper << np.uint32(16)).view(np.float32))
    assert dtype == "float32"
    return a
