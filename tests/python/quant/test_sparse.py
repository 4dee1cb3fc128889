# SPDX-License-Identifier: MIT
"""Sparse matrices and their products."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIGNIFICAND = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 20}


def numpy(tensor):
    return tensor.detach().cpu().double().numpy()


def sparse(rows, cols, nnz, device, dtype=torch.float16):
    """A random matrix as a list of its elements, row by row, and as it is."""
    places = torch.randperm(rows * cols)[:nnz].sort().values
    values = torch.randn(nnz).to(dtype)
    dense = torch.zeros(rows, cols, dtype=dtype)
    dense.view(-1)[places] = values
    rowidx, colidx = (places // cols).int().to(device), (places % cols).int().to(device)
    coo = F.COOSparseTensor(rows, cols, nnz, rowidx, colidx, values.to(device))
    return coo, numpy(dense)


def assert_near(actual, expected, dtype, size):
    assert actual.dtype == dtype and tuple(actual.shape) == expected.shape
    bound = np.abs(expected) * 2.0 ** -SIGNIFICAND[dtype] + size * 2.0**-20
    assert (np.abs(numpy(actual) - expected) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "nnz"), [(7, 11, 20), (1, 5, 5), (40, 3, 1), (6, 6, 0)])
def test_spmm(device, rows, cols, nnz, dtype):
    coo, dense = sparse(rows, cols, nnz, device, dtype)
    B = torch.randn(cols, 9, device=device).to(dtype)
    want = dense @ numpy(B)
    size = np.abs(dense) @ np.abs(numpy(B))
    for right in (B, B.t().contiguous().t()):
        assert_near(F.spmm_coo(coo, right), want, dtype, size)
    out = torch.ones(rows, 9, device=device, dtype=dtype)
    assert F.spmm_coo(coo, B, out) is out
    assert_near(out, want, dtype, size)
    places = torch.stack([coo.rowidx, coo.colidx]).long()
    tensor = torch.sparse_coo_tensor(places, coo.values, (rows, cols), check_invariants=True)
    assert_near(F.spmm_coo(tensor, B), want, dtype, size)
    assert_near(F.spmm_coo_very_sparse(tensor, B), want, dtype, size)
    assert_near(F.spmm_coo_very_sparse(coo, B), want, dtype, size)


def test_spmm_keeps_float32_under_autocast():
    coo, dense = sparse(5, 6, 12, "cpu", torch.float32)
    B = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.spmm_coo(coo, B)
    assert_near(out, dense @ numpy(B), torch.float32, np.abs(dense) @ np.abs(numpy(B)))


def test_very_sparse_adds_the_product_of_codes(device):
    coo, dense = sparse(8, 20, 30, device)
    codes = torch.randint(-127, 128, (20, 5), dtype=torch.int8, device=device)
    stats = torch.rand(5, device=device) * 3
    values = numpy(codes) * numpy(stats) / 127
    start = torch.randn(8, 5, device=device).half()
    out = start.clone()
    assert F.spmm_coo_very_sparse(coo, codes, stats, out) is out
    size = np.abs(dense) @ np.abs(values) + np.abs(numpy(start))
    assert_near(out, numpy(start) + dense @ values, torch.float16, size)
    plain = F.spmm_coo_very_sparse(coo, codes)
    assert_near(plain, dense @ numpy(codes), torch.float16, np.abs(dense) @ np.abs(numpy(codes)))


def test_places_outside_are_refused_on_the_cpu():
    index = torch.tensor([3], dtype=torch.int32)
    coo = F.COOSparseTensor(3, 4, 1, index, index, torch.ones(1))
    with pytest.raises(RuntimeError, match="size is inconsistent with indices"):
        F.spmm_coo(coo, torch.ones(4, 2))


def from_rows(pointers, index, values, shape):
    return torch.sparse_csr_tensor(pointers, index, values.float(), shape, check_invariants=True)


def numpy_rows(pointers, index, values, shape):
    """The matrix that is held row by row."""
    dense = np.zeros(shape)
    for row in range(shape[0]):
        for i in range(pointers[row], pointers[row + 1]):
            dense[row, index[i]] += values[i].item()
    return dense


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("rows", "cols", "nnz"), [(7, 11, 20), (4, 9, 0), (3, 3, 9)])
def test_rows_and_columns(device, rows, cols, nnz, shuffled):
    coo, dense = sparse(rows, cols, nnz, device)
    if shuffled:
        order = torch.randperm(nnz, device=device)
        parts = (part[order] for part in (coo.rowidx, coo.colidx, coo.values))
        coo = F.COOSparseTensor(rows, cols, nnz, *parts)
    csr, csc = F.coo2csr(coo), F.coo2csc(coo)
    assert type(csr) is F.CSRSparseTensor and type(csc) is F.CSCSparseTensor
    assert csr.rowptr.dtype == csc.colptr.dtype == torch.int32
    by_rows = numpy_rows(csr.rowptr, csr.colidx, csr.values, (rows, cols))
    by_cols = numpy_rows(csc.colptr, csc.rowidx, csc.values, (cols, rows))
    np.testing.assert_array_equal(by_rows, dense)
    np.testing.assert_array_equal(by_cols.T, dense)


def test_zeros(device):
    coo = F.coo_zeros(3, 4, 5, device)
    assert (coo.rows, coo.cols, coo.nnz) == (3, 4, 5)
    assert coo.values.dtype == torch.float16 and coo.rowidx.dtype == torch.int32
    assert coo.values.device.type == coo.colidx.device.type == device
    coo.rowidx[0] = 1
    assert coo.colidx[0] == 0
    assert not F.spmm_coo(coo, torch.ones(4, 2, device=device)).any()


INDEX, VALUES = torch.zeros(2, dtype=torch.int32), torch.zeros(2)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("rowidx", lambda: F.COOSparseTensor(3, 3, 2, INDEX.long(), INDEX, VALUES)),
        ("colidx", lambda: F.COOSparseTensor(3, 3, 2, INDEX, INDEX[:1], VALUES)),
        ("values", lambda: F.COOSparseTensor(3, 3, 2, INDEX, INDEX, VALUES.double())),
        ("values", lambda: F.COOSparseTensor(3, 3, 1, INDEX[:1], INDEX[:1], VALUES)),
        ("rowptr", lambda: F.CSRSparseTensor(3, 3, 2, INDEX, INDEX, VALUES)),
        ("colptr", lambda: F.CSCSparseTensor(3, 3, 2, INDEX, INDEX, VALUES)),
        ("B", lambda: F.spmm_coo(F.coo_zeros(3, 4, 1, "cpu"), torch.ones(3, 2))),
        ("B", lambda: F.spmm_coo_very_sparse(F.coo_zeros(3, 4, 1, "cpu"), INDEX.view(1, 2))),
        ("out", lambda: F.spmm_coo(F.coo_zeros(3, 4, 1, "cpu"), torch.ones(4, 2), torch.ones(2))),
    ],
)
def test_bad_arguments_get_a_sentence(argument, call):
    with pytest.raises(ValueError, match=rf"^\w+: {argument} must be .*, got "):
        call()
