# SPDX-License-Identifier: MIT
"""Executable specification of the older int8 functions, in NumPy and without bitsandbytes."""

import numpy as np

__all__ = [
    "double_quant",
    "element_place",
    "padded_shape",
    "round_to_levels",
    "switchback",
    "vectorwise",
]


def padded_shape(rows: int, cols: int, order: str) -> tuple[int, int]:
    """Returns the shape of the memory of a matrix in a layout of tiles."""
    tile = {"col32": 1, "col_turing": 8, "col_ampere": 32}[order]
    return -(-rows // tile) * tile, -(-cols // 32) * 32


def element_place(r: int, c: int, rows: int, cols: int, order: str) -> int:
    """Returns where element (r, c) lies in the flattened memory of a layout."""
    if order == "row":
        return r * cols + c
    if order == "col":
        return c * rows + r
    slab = (c // 32) * 32 * padded_shape(rows, cols, order)[0]
    if order == "col32":
        return slab + r * 32 + c % 32
    if order == "col_turing":
        odd = r % 2
        return slab + (r // 8) * 256 + 128 * odd + ((c % 32) // 4) * 16 + c % 4 + 2 * (r % 8 - odd)
    q = r % 32
    return slab + (r // 32) * 1024 + (((q % 8) // 2) * 8 + (q // 8) * 2 + q % 2) * 32 + c % 32


def double_quant(a: np.ndarray, threshold: float, whole_columns: bool):
    """Returns codes by rows, codes by columns, and the statistics of rows and columns."""
    a = np.asarray(a, np.float32)
    rows, cols = a.shape
    outlier = np.abs(a) >= np.float32(threshold) if threshold > 0 else np.zeros(a.shape, bool)
    counted = np.where(outlier, np.float32(0), np.abs(a))
    row_stats, col_stats = counted.max(axis=1), counted.max(axis=0)
    by_rows, by_cols = np.zeros(a.shape, np.int8), np.zeros(a.shape, np.int8)
    for i in range(rows):
        for j in range(cols):
            if not outlier[i, j] and col_stats[j] > 0:
                by_cols[i, j] = np.rint(a[i, j] * (np.float32(127) / col_stats[j]))
            dropped = outlier[:, j].any() if whole_columns else outlier[i, j]
            if not dropped and row_stats[i] > 0:
                by_rows[i, j] = np.rint(a[i, j] * (np.float32(127) / row_stats[i]))
    return by_rows, by_cols, row_stats, col_stats


def vectorwise(x: np.ndarray, axis: int, quant_type: str):
    """Returns codes and scales of one of the variants, in float64."""
    x = np.float64(x)
    whole = quant_type in ("linear", "zeropoint")
    over = None if whole else axis
    if quant_type.endswith("zeropoint"):
        low, high = x.min(axis=over, keepdims=not whole), x.max(axis=over, keepdims=not whole)
        reach = high - low
        factor = 255 / np.where(reach == 0, 1, reach)
        zero = np.rint(low * factor)
        return np.rint(x * factor - zero) + zero, factor
    most = np.abs(x).max(axis=over, keepdims=not whole)
    if quant_type == "truncated-vector":
        most = 0.7 * most
        x = np.clip(x, -most, most)
    return np.rint(x / most * 127), most


def switchback(a, weight, bias, grad, vectorwise_scales: bool, keep_codes: bool):
    """Returns the result of a SwitchBack layer and the gradients of its input and its weight."""
    a, weight, grad = np.float64(a), np.float64(weight), np.float64(grad)

    def rounded(x, axis):
        most = np.abs(x).max(axis=axis, keepdims=True)
        return np.rint(x / most * 127) * most / 127

    rows_of_weight = rounded(weight, 1 if vectorwise_scales else None)
    columns_of_weight = rounded(weight, 0) if vectorwise_scales else rows_of_weight
    result = rounded(a, 1) @ rows_of_weight.T + np.float64(bias)
    kept = rounded(a, 1) if keep_codes else a
    return result, rounded(grad, 1) @ columns_of_weight, grad.T @ kept


def round_to_levels(x: np.ndarray, levels: np.ndarray, block: int | None) -> np.ndarray:
    """Returns x with each block of the flattened array scaled by its largest magnitude, and every
    element replaced by the nearest level; with one scale if `block` is None."""
    flat = np.float64(x).ravel()
    block = block or flat.size
    out = np.empty_like(flat)
    for start in range(0, flat.size, block):
        part = flat[start : start + block]
        most = np.abs(part).max() or 1.0
        nearest = np.abs(part[:, None] / most - np.float64(levels)[None, :]).argmin(axis=1)
        out[start : start + block] = np.float64(levels)[nearest] * most
    return out.reshape(np.shape(x))
