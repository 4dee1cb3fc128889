# SPDX-License-Identifier: MIT
"""int8 quantization by rows and by columns at once."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.plain import int8 as plain
from reference import legacy8 as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def planted(device, dtype):
    A = torch.randn(9, 40, device=device)
    A[2, 5], A[2, 6], A[8, 39] = 9.0, -7.0, 6.0
    A[3], A[:, 4] = 0.0, 0.0
    return A.to(dtype)


def numpy(tensor):
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def assert_quantized(results, A, threshold, whole_columns):
    names = ("codes by rows", "codes by columns", "row_stats", "col_stats")
    flat = numpy(A).reshape(-1, A.shape[-1])
    for name, result, want in zip(
        names, results, reference.double_quant(flat, threshold, whole_columns), strict=True
    ):
        np.testing.assert_array_equal(numpy(result).reshape(want.shape), want, err_msg=name)
    assert results[0].shape == results[1].shape == A.shape


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_double_quant(device, dtype, threshold):
    A = planted(device, dtype)
    before = A.clone()
    for call in (F.int8_double_quant, plain.int8_double_quant):
        for shaped in (A, A.view(3, 3, 40), A.t().contiguous().t()):
            *results, columns = call(shaped, threshold=threshold)
            assert_quantized(results, shaped, threshold, True)
            if threshold:
                assert columns.dtype == torch.int64 and columns.tolist() == [5, 6, 39]
            else:
                assert columns is None
    assert torch.equal(A, before)


@pytest.mark.parametrize("threshold", [0.0, 6.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quant(device, dtype, threshold):
    A = planted(device, dtype)
    *results, outliers = F.double_quant(A, threshold=threshold)
    assert_quantized(results, A, threshold, False)
    if threshold != 6.0:
        assert outliers is None
        return
    assert (outliers.rows, outliers.cols, outliers.nnz) == (9, 40, 3)
    assert outliers.rowidx.tolist() == [2, 2, 8] and outliers.colidx.tolist() == [5, 6, 39]
    assert outliers.values.tolist() == [9.0, -7.0, 6.0] and outliers.values.dtype == dtype
    # Codes and outliers together are the matrix.
    whole = F.int8_vectorwise_dequant(results[0], results[2])
    whole[outliers.rowidx.long(), outliers.colidx.long()] += outliers.values.float()
    step = results[2].max() / 127
    assert (whole - A.float()).abs().max() <= step * 0.501


def test_double_quant_fills_buffers(device):
    A = planted(device, torch.float16)
    want = F.double_quant(A, threshold=6.0)
    buffers = {
        "out_row": torch.zeros(9, 40, dtype=torch.int8, device=device),
        "out_col": torch.zeros(9, 40, dtype=torch.int8, device=device),
        "row_stats": torch.zeros(9, 1, device=device),
        "col_stats": torch.zeros(1, 40, device=device),
    }
    results = F.double_quant(A, threshold=6.0, **buffers)
    for result, expected, buffer in zip(results, want, buffers.values(), strict=False):
        assert result is buffer and torch.equal(result.flatten(), expected.flatten())


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_absmax_of_rows_and_columns(device, threshold):
    A = planted(device, torch.float16)
    _, _, want_rows, want_cols = reference.double_quant(numpy(A), threshold, True)
    rows, cols, mask = F.get_colrow_absmax(A.view(3, 3, 40), threshold=threshold)
    np.testing.assert_array_equal(numpy(rows), want_rows)
    np.testing.assert_array_equal(numpy(cols), want_cols)
    np.testing.assert_array_equal(numpy(F.get_row_absmax(A, threshold)), want_rows)
    assert rows.dtype == cols.dtype == torch.float32
    if threshold:
        assert torch.equal(mask.view(9, 40), A.abs() >= 6)
    else:
        assert mask is None
    row_buffer, col_buffer = torch.zeros(9, 1, device=device), torch.zeros(40, device=device)
    rows, cols, _ = F.get_colrow_absmax(A, row_buffer, col_buffer, threshold=threshold)
    assert rows is row_buffer and cols is col_buffer
    np.testing.assert_array_equal(numpy(rows).ravel(), want_rows)


def test_bad_arguments_get_a_sentence():
    A = torch.ones(2, 2)
    with pytest.raises(ValueError, match="int8_double_quant: out_row must be None, got a tensor"):
        F.int8_double_quant(A, out_row=A)
    for call in (F.int8_double_quant, F.double_quant):
        with pytest.raises((ValueError, RuntimeError), match=r"\bA must be"):
            call(A.double())
        with pytest.raises((ValueError, RuntimeError), match="threshold must be"):
            call(A, threshold=-1.0)
    with pytest.raises(ValueError, match="get_colrow_absmax: A must be"):
        F.get_colrow_absmax(A.int())
