# SPDX-License-Identifier: MIT
"""Sparse matrices as lists of their elements, and their products with dense ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import FLOATS, check, check_dtype, check_numel, check_output
from .._precision import full_precision
from .vectorwise import CODE_MAX

__all__ = [
    "COOSparseTensor",
    "CSCSparseTensor",
    "CSRSparseTensor",
    "coo2csc",
    "coo2csr",
    "coo_zeros",
    "spmm_coo",
    "spmm_coo_very_sparse",
]


def _check_parts(name: str, values: Tensor, nnz: int, indices: dict[str, tuple[Tensor, int]]):
    check_dtype(name, "values", values, *FLOATS)
    check_numel(name, "values", values, nnz, "elements")
    for argument, (tensor, count) in indices.items():
        check_dtype(name, argument, tensor, torch.int32)
        check_numel(name, argument, tensor, count, "indices")


@dataclass(eq=False)
class COOSparseTensor:
    """A sparse matrix as row, column and value of each of its elements.

    Attributes:
        rows: Number of rows.
        cols: Number of columns.
        nnz: Number of elements held.
        rowidx: int32 rows ``[nnz]``.
        colidx: int32 columns ``[nnz]``.
        values: float16, bfloat16 or float32 values ``[nnz]``.

    Raises:
        ValueError: If a dtype or a number of elements does not fit.

    Example:
        >>> index = torch.tensor([1], dtype=torch.int32)
        >>> COOSparseTensor(2, 2, 1, index, index, torch.tensor([3.0])).values
        tensor([3.])
    """

    rows: int
    cols: int
    nnz: int
    rowidx: Tensor
    colidx: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        indices = {"rowidx": (self.rowidx, self.nnz), "colidx": (self.colidx, self.nnz)}
        _check_parts("COOSparseTensor", self.values, self.nnz, indices)


@dataclass(eq=False)
class CSRSparseTensor:
    """A sparse matrix row by row: elements of row i are ``rowptr[i]`` to ``rowptr[i + 1] - 1``.

    Attributes:
        rows: Number of rows.
        cols: Number of columns.
        nnz: Number of elements held.
        rowptr: int32 ``[rows + 1]``.
        colidx: int32 columns ``[nnz]``.
        values: Values ``[nnz]``.
    """

    rows: int
    cols: int
    nnz: int
    rowptr: Tensor
    colidx: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        indices = {"rowptr": (self.rowptr, self.rows + 1), "colidx": (self.colidx, self.nnz)}
        _check_parts("CSRSparseTensor", self.values, self.nnz, indices)


@dataclass(eq=False)
class CSCSparseTensor:
    """A sparse matrix column by column: elements of column j begin at ``colptr[j]``.

    Attributes:
        rows: Number of rows.
        cols: Number of columns.
        nnz: Number of elements held.
        colptr: int32 ``[cols + 1]``.
        rowidx: int32 rows ``[nnz]``.
        values: Values ``[nnz]``.
    """

    rows: int
    cols: int
    nnz: int
    colptr: Tensor
    rowidx: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        indices = {"colptr": (self.colptr, self.cols + 1), "rowidx": (self.rowidx, self.nnz)}
        _check_parts("CSCSparseTensor", self.values, self.nnz, indices)


def coo_zeros(
    rows: int,
    cols: int,
    nnz: int,
    device: torch.device | str | int,
    dtype: torch.dtype = torch.half,
) -> COOSparseTensor:
    """Returns a sparse matrix with room for `nnz` elements: zeros, all at row and column 0."""
    index = torch.zeros(nnz, dtype=torch.int32, device=device)
    values = torch.zeros(nnz, dtype=dtype, device=device)
    return COOSparseTensor(rows, cols, nnz, index, index.clone(), values)


def _pointers(sorted_index: Tensor, count: int) -> Tensor:
    places = torch.arange(count + 1, dtype=torch.int32, device=sorted_index.device)
    return torch.searchsorted(sorted_index, places, out_int32=True)


def coo2csr(cooA: COOSparseTensor) -> CSRSparseTensor:
    """Returns the same matrix row by row; elements of a row keep their order."""
    rowidx, order = torch.sort(cooA.rowidx, stable=True)
    return CSRSparseTensor(
        cooA.rows,
        cooA.cols,
        cooA.nnz,
        _pointers(rowidx, cooA.rows),
        cooA.colidx[order],
        cooA.values[order],
    )


def coo2csc(cooA: COOSparseTensor) -> CSCSparseTensor:
    """Returns the same matrix column by column; elements of a column keep their order."""
    colidx, order = torch.sort(cooA.colidx, stable=True)
    return CSCSparseTensor(
        cooA.rows,
        cooA.cols,
        cooA.nnz,
        _pointers(colidx, cooA.cols),
        cooA.rowidx[order],
        cooA.values[order],
    )


def _product(name: str, A: COOSparseTensor | Tensor, B: Tensor) -> Tensor:
    """Returns the float32 product of a sparse and a dense matrix."""
    if not isinstance(A, Tensor):
        index = torch.stack([A.rowidx, A.colidx]).long()
        # Checking indices on a device would wait for it.
        on_cpu = index.device.type == "cpu"
        A = torch.sparse_coo_tensor(index, A.values, (A.rows, A.cols), check_invariants=on_cpu)
    check(B.dim() == 2, name, "B", "a matrix", f"shape {list(B.shape)}")
    check(A.shape[1] == B.shape[0], name, "B", f"[{A.shape[1]}, N]", list(B.shape))
    with full_precision(B.device):
        return torch.sparse.mm(A.float(), B.float())


def spmm_coo(cooA: COOSparseTensor | Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiplies a sparse matrix with a dense one, with sums in float32.

    On CUDA and ROCm this is a product of cuSPARSE or hipSPARSE.

    Args:
        cooA: Sparse matrix ``[M, K]``, as :class:`COOSparseTensor` or a sparse tensor of PyTorch.
        B: Floating-point matrix ``[K, N]``, of any strides.
        out: Tensor ``[M, N]`` that takes the product.

    Returns:
        ``[M, N]`` in the dtype of `B`; `out` if given.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> index = torch.tensor([1], dtype=torch.int32)
        >>> A = COOSparseTensor(2, 2, 1, index, index, torch.tensor([3.0]))
        >>> spmm_coo(A, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[ 0.,  0.],
                [ 9., 12.]])
    """
    product = _product("spmm_coo", cooA, B)
    if out is None:
        return product.to(B.dtype)
    check_output("spmm_coo", "out", out, product.shape)
    return out.copy_(product)


def spmm_coo_very_sparse(
    cooA: COOSparseTensor | Tensor,
    B: Tensor,
    dequant_stats: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds the product of a sparse matrix and a dense one, which may be int8 codes, to `out`.

    Args:
        cooA: Sparse matrix ``[M, K]``, as :class:`COOSparseTensor` or a sparse tensor of PyTorch.
        B: Floating-point or int8 matrix ``[K, N]``.
        dequant_stats: float32 statistics of the columns of int8 codes, ``[N]``: a code is worth
            ``statistic / 127``. Without them a code is worth 1.
        out: Tensor ``[M, N]`` that the product is added to; zeros if None.

    Returns:
        `out`, or a tensor in the dtype of the sparse values.

    Raises:
        ValueError: If a dtype or the shapes do not fit.

    Example:
        >>> index = torch.tensor([1], dtype=torch.int32)
        >>> A = COOSparseTensor(2, 2, 1, index, index, torch.tensor([3.0]))
        >>> codes = torch.tensor([[0, 0], [127, -127]], dtype=torch.int8)
        >>> spmm_coo_very_sparse(A, codes, torch.tensor([1.0, 2.0]))
        tensor([[ 0.,  0.],
                [ 3., -6.]])
    """
    name = "spmm_coo_very_sparse"
    check_dtype(name, "B", B, torch.int8, *FLOATS)
    values = cooA if isinstance(cooA, Tensor) else cooA.values
    product = _product(name, cooA, B)
    if dequant_stats is not None:
        check(B.dtype == torch.int8, name, "B", "int8 where dequant_stats is given", B.dtype)
        check_numel(name, "dequant_stats", dequant_stats, B.shape[1], "columns of B")
        product *= dequant_stats.flatten() / CODE_MAX
    if out is None:
        return product.to(values.dtype)
    check_output(name, "out", out, product.shape)
    return out.copy_(product.add_(out))
