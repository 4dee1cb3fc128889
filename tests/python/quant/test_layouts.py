# SPDX-License-Identifier: MIT
"""Layouts of int8 matrices, and the chains of calls of programs that ask for them."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
from reference import legacy8 as reference
from reference import linear

TILES = ["col32", "col_turing", "col_ampere"]
ORDERS = ["row", "col", *TILES]
SHAPES = [(1, 1), (5, 40), (8, 32), (33, 64), (65, 31)]


def matrix(rows, cols, device, dtype=torch.int8):
    return torch.randint(-127, 128, (rows, cols), dtype=dtype, device=device)


def memory(a, order):
    """What the specification has in memory for a matrix in a layout."""
    rows, cols = a.shape
    shape = reference.padded_shape(rows, cols, order) if order in TILES else (rows, cols)
    flat = np.zeros(shape, a.dtype).ravel()
    for r in range(rows):
        for c in range(cols):
            flat[reference.element_place(r, c, rows, cols, order)] = a[r, c]
    return flat.reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_transform_matches_specification(device, order, shape):
    A = matrix(*shape, device)
    for transpose in (False, True):
        moved, state = F.transform(A, order, transpose=transpose)
        want = A.cpu().numpy().T if transpose else A.cpu().numpy()
        np.testing.assert_array_equal(moved.cpu().numpy(), memory(want, order))
        assert state == (want.shape, order)
        back, back_state = F.transform(moved, "row", state=state)
        assert back_state == (want.shape, "row")
        np.testing.assert_array_equal(back.cpu().numpy(), want)


def test_transform_takes_batches_buffers_and_other_layouts(device):
    A = matrix(6, 40, device, torch.int32).view(2, 3, 40)
    buffer, state = F.get_transform_buffer(A.shape, A.dtype, device, "col32")
    assert buffer.shape == (6, 64) and state == ((2, 3, 40), "col32") and not buffer.any()
    moved, state = F.nvidia_transform(A, "col32", out=buffer)
    assert moved is buffer and state == ((2, 3, 40), "col32")
    other, other_state = F.transform(moved, "col_ampere", state=state)
    assert other.shape == (32, 64) and other_state == ((2, 3, 40), "col_ampere")
    assert torch.equal(F.transform(other, "row", state=other_state)[0], A)
    turned, _ = F.transform(A.view(6, 40), "row", transpose=True)
    assert torch.equal(turned, A.view(6, 40).t())
    assert torch.equal(F.transform(moved, "row", from_order="col32", state=state)[0], A)


@pytest.mark.parametrize("layout_of_weight", ORDERS)
@pytest.mark.parametrize("layout", ORDERS)
def test_igemmlt_of_any_layout(device, layout, layout_of_weight):
    A, B = matrix(12, 70, device), matrix(9, 70, device)
    left, SA = F.transform(A.view(3, 4, 70), layout)
    right, SB = F.transform(B, layout_of_weight)
    product, state = F.igemmlt(left, right, SA, SB)
    assert state == ((3, 4, 9), "row" if layout == "row" else "col32")
    rows = F.transform(product, "row", state=state)[0]
    want = linear.matmul(A.cpu().numpy(), B.cpu().numpy())
    np.testing.assert_array_equal(rows.cpu().numpy().reshape(12, 9), want)
    bounded, state = F.igemmlt(left, right, SA, SB, dtype=torch.int8)
    rows = F.transform(bounded, "row", state=state)[0]
    np.testing.assert_array_equal(rows.cpu().numpy().reshape(12, 9), want.clip(-128, 127))
    out = torch.ones_like(product)
    assert F.igemmlt(left, right, SA, SB, out)[0] is out and torch.equal(out, product)

    row_stats, col_stats = torch.rand(12, device=device), torch.rand(9, device=device)
    bias = torch.randn(9, device=device).half()
    values = F.mm_dequant(product, (state[0], state[1]), row_stats, col_stats, bias=bias)
    shift = bias.cpu().double().numpy()
    scaled = linear.mm_dequant(want, row_stats.cpu().numpy(), col_stats.cpu().numpy(), shift)
    assert values.dtype == torch.float16
    np.testing.assert_allclose(values.cpu().double().view(12, 9), scaled, rtol=2e-3, atol=2e-3)


def test_extract_outliers(device):
    A, idx = matrix(40, 70, device), torch.tensor([69, 0, 33], dtype=torch.int32, device=device)
    for order in ORDERS:
        moved, state = F.transform(A, order)
        assert torch.equal(F.extract_outliers(moved, state, idx), A[:, idx.long()])


def test_a_linear_layer_of_0_41(device):
    """The chain of calls that programs of that time made for an int8 layer."""
    x = torch.randn(6, 64, device=device).half()
    x[1, 7] = 20
    weight = torch.randn(10, 64, device=device).half()
    layout = F.get_special_format_str()
    CB, _, SCB, _, _ = F.double_quant(weight)
    CxB, SB = F.transform(CB, to_order=layout)
    CA, _, SCA, _, outliers = F.double_quant(x, threshold=6.0)
    columns = torch.unique(outliers.colidx)
    CA[:, columns.long()] = 0
    subB = (F.extract_outliers(CxB, SB, columns.int()).t() * SCB / 127).half()
    C32A, SA = F.transform(CA, "col32")
    product, S = F.igemmlt(C32A, CxB, SA, SB)
    out = F.mm_dequant(product, S, SCA, SCB)
    out += x[:, columns.long()] @ subB
    codes, stats, _ = linear.quantize(weight.cpu().numpy())
    want = linear.linear(x.cpu().double().numpy(), codes, stats, None, 6.0)
    np.testing.assert_allclose(out.cpu().double().numpy(), want, rtol=2e-3, atol=2e-2)


def test_other_layouts_and_sizes_are_refused():
    A = matrix(4, 4, "cpu")
    for call in (
        lambda: F.transform(A, "col64"),
        lambda: F.transform(A, "row", from_order="col64"),
        lambda: F.get_transform_buffer((4, 4), torch.int8, "cpu", "col4_4r2_8c"),
    ):
        with pytest.raises(NotImplementedError, match=r"the layout must be one of row, col, .*got"):
            call()
    with pytest.raises(ValueError, match="must have 128 elements, got shape"):
        F.transform(A, "row", state=((4, 4), "col32"))
    with pytest.raises(ValueError, match="igemmlt: dtype must be"):
        F.igemmlt(A, A, ((4, 4), "row"), ((4, 4), "row"), dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError), match="int8_linear_matmul: "):
        F.igemmlt(A, matrix(4, 5, "cpu"), ((4, 4), "row"), ((4, 5), "row"))
