# SPDX-License-Identifier: MIT
"""int8 quantization of a matrix by rows and by columns at once, for both directions of training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import FLOATS, check, check_dtype, check_output
from .sparse import COOSparseTensor

__all__ = ["double_quant", "get_colrow_absmax", "get_row_absmax", "int8_double_quant"]


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantizes a matrix by rows and by columns.

    Args:
        A: float16, bfloat16 or float32 ``[..., K]``; leading dimensions are rows.
        col_stats: Must be None, as must the three that follow: no buffers are taken.
        row_stats: See `col_stats`.
        out_col: See `col_stats`.
        out_row: See `col_stats`.
        threshold: Magnitude from which a value is an outlier; 0 for none. Outliers do not count for
            statistics. Codes by rows are zero in every column that holds one, codes by columns at
            the outliers alone.

    Returns:
        int8 codes by rows and by columns, in the shape of `A`; the float32 statistics of the rows
        and of the columns; and the outlier columns, int64, or None without a threshold.

    Raises:
        ValueError: If a buffer is given, or `A` or `threshold` does not fit.

    Example:
        >>> rows, cols, *stats, _ = int8_double_quant(torch.tensor([[1.0, -2.0], [0.5, 0.5]]))
        >>> rows.tolist(), cols.tolist()
        ([[64, -127], [127, 127]], [[127, -127], [64, 32]])
    """
    for name, buffer in (
        ("col_stats", col_stats),
        ("row_stats", row_stats),
        ("out_col", out_col),
        ("out_row", out_row),
    ):
        check(buffer is None, "int8_double_quant", name, "None", "a tensor")
    return torch.ops.bitsandbytes.int8_double_quant.default(A, threshold)


def double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, COOSparseTensor | None]:
    """Quantizes a matrix by rows and by columns, and takes outliers out as a sparse matrix.

    Args:
        A: float16, bfloat16 or float32 ``[..., K]``; leading dimensions are rows.
        col_stats: float32 buffer for the statistics of columns, ``[K]``.
        row_stats: float32 buffer for the statistics of rows.
        out_col: int8 buffer for the codes by columns.
        out_row: int8 buffer for the codes by rows.
        threshold: Magnitude from which a value is an outlier; 0 for none. Outliers do not count for
            statistics, and their codes are zero; other values of their columns keep theirs.

    Returns:
        int8 codes by rows and by columns, in the shape of `A`; the float32 statistics of the rows
        and of the columns; and the outliers, or None if there are none.

    Raises:
        ValueError: If `A` or `threshold` does not fit.

    Example:
        >>> A = torch.tensor([[1.0, 9.0]])
        >>> rows, _, row_stats, _, outliers = double_quant(A, threshold=6.0)
        >>> rows, row_stats, outliers.values
        (tensor([[127,   0]], dtype=torch.int8), tensor([1.]), tensor([9.]))
    """
    check_dtype("double_quant", "A", A, *FLOATS)
    check(threshold >= 0, "double_quant", "threshold", "zero or positive", threshold)
    values, outliers = A, None
    if threshold > 0:
        mask = A.abs() >= threshold
        values = A.masked_fill(mask, 0)
        outliers = _elements(A.reshape(-1, A.shape[-1]), mask.reshape(-1, A.shape[-1]))
    results = torch.ops.bitsandbytes.int8_double_quant.default(values)[:4]
    names = ("out_row", "out_col", "row_stats", "col_stats")
    filled = _filled("double_quant", names, (out_row, out_col, row_stats, col_stats), results)
    return *filled, outliers


def _filled(name: str, arguments: Sequence[str], buffers, results) -> list[Tensor]:
    """Returns the results, in the buffers that there are for them."""
    for argument, buffer, result in zip(arguments, buffers, results, strict=True):
        check_output(name, argument, buffer, result.numel())
    return [
        result if buffer is None else buffer.copy_(result.view(buffer.shape))
        for buffer, result in zip(buffers, results, strict=True)
    ]


def _elements(A: Tensor, mask: Tensor) -> COOSparseTensor | None:
    """Returns the elements of a matrix that a mask names, row by row."""
    places = mask.nonzero()
    if places.shape[0] == 0:
        return None
    rowidx, colidx = (index.contiguous() for index in places.to(torch.int32).unbind(1))
    return COOSparseTensor(*A.shape, places.shape[0], rowidx, colidx, A[mask])


def get_colrow_absmax(
    A: Tensor,
    row_stats: Tensor | None = None,
    col_stats: Tensor | None = None,
    nnz_block_ptr: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the largest magnitudes of rows and of columns, outliers left out.

    Args:
        A: float16, bfloat16 or float32 ``[..., K]``; leading dimensions are rows.
        row_stats: float32 buffer for the result of rows.
        col_stats: float32 buffer for the result of columns.
        nnz_block_ptr: Not used.
        threshold: Magnitude from which a value is an outlier; 0 for none.

    Returns:
        float32 ``[rows]`` and ``[K]``, and with a threshold the mask of the outliers, in the shape
        of `A`.

    Raises:
        ValueError: If the dtype of `A` is another one.

    Example:
        >>> get_colrow_absmax(torch.tensor([[1.0, 9.0]]), threshold=6.0)
        (tensor([1.]), tensor([1., 0.]), tensor([[False,  True]]))
    """
    check_dtype("get_colrow_absmax", "A", A, *FLOATS)
    magnitudes = A.abs()
    mask = magnitudes >= threshold if threshold > 0 else None
    if mask is not None:
        magnitudes.masked_fill_(mask, 0)
    magnitudes = magnitudes.reshape(-1, A.shape[-1]).float()
    results = (magnitudes.amax(1), magnitudes.amax(0))
    names = ("row_stats", "col_stats")
    rows, cols = _filled("get_colrow_absmax", names, (row_stats, col_stats), results)
    return rows, cols, mask


def get_row_absmax(A: Tensor, threshold: float = 0.0) -> Tensor:
    """Returns the first result of :func:`get_colrow_absmax`."""
    return get_colrow_absmax(A, threshold=threshold)[0]
