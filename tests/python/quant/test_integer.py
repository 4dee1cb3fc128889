# SPDX-License-Identifier: MIT
"""Exact products of int8 matrices under their old names."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F

pytestmark = pytest.mark.filterwarnings("ignore:.*int8_linear_matmul:FutureWarning")


def integers(*shape, device="cpu"):
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


def exact(a, b):
    return torch.from_numpy(a.cpu().numpy().astype(np.int64) @ b.cpu().numpy().astype(np.int64))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 5), (5, 4)),
        ((2, 3, 5), (5, 4)),
        ((2, 3, 5), (2, 5, 4)),
        ((70, 1000), (1000, 9)),
        ((0, 5), (5, 4)),
        ((0, 3, 5), (0, 5, 4)),
        ((2, 3, 0), (2, 0, 4)),
    ],
)
def test_igemm_is_exact(device, a, b):
    A, B = integers(*a, device=device), integers(*b, device=device)
    want = exact(A, B)
    product = F.igemm(A, B)
    assert product.dtype == torch.int32 and torch.equal(product.cpu().long(), want)
    # Views that are transposed already, and the flags, say the same.
    turned_A = A.transpose(-2, -1).contiguous()
    turned_B = B.transpose(-2, -1).contiguous()
    assert torch.equal(F.igemm(turned_A.transpose(-2, -1), turned_B.transpose(-2, -1)), product)
    assert torch.equal(F.igemm(turned_A, turned_B, None, True, True), product)
    out = torch.full_like(product, 7)
    assert F.igemm(A, B, out) is out and torch.equal(out, product)
    if A.dim() == B.dim() == 3:
        assert torch.equal(F.batched_igemm(A, B), product)
        assert F.batched_igemm(A, B, out=out.zero_()) is out and torch.equal(out, product)


def test_igemm_sums_over_batch_and_rows(device):
    A, B = integers(3, 7, 5, device=device), integers(3, 7, 4, device=device)
    out = torch.zeros(5, 4, dtype=torch.int32, device=device)
    assert F.igemm(A, B, out) is out
    want = np.einsum("bsi,bso->io", *(x.cpu().numpy().astype(np.int64) for x in (A, B)))
    np.testing.assert_array_equal(out.cpu().numpy(), want)


def test_check_matmul():
    A, B = integers(2, 3, 5), integers(2, 5, 4)
    assert F.check_matmul(A, B, None, False, False) == (2, 3, 4)
    assert F.check_matmul(A[0], B[0], None, False, False) == (3, 4)
    assert F.check_matmul(A, B[0], None, False, False) == (2, 3, 4)
    assert F.check_matmul(A[0], A[0], None, True, False) == (5, 5)
    assert F.check_matmul(A[0], A[0], None, False, True) == (3, 3)
    out = torch.zeros(5, 4, dtype=torch.int32)
    assert F.check_matmul(A, A[:, :, :4], out, False, False) == (5, 4)
    assert F.check_matmul(A[0].float(), B[0].float(), None, False, False, torch.float32) == (3, 4)


@pytest.mark.parametrize(
    ("A", "B", "out"),
    [
        (integers(3, 5), integers(4, 5), None),
        (integers(5), integers(5, 4), None),
        (integers(3, 5), integers(2, 5, 4), None),
        (integers(3, 3, 5), integers(2, 5, 4), None),
        (integers(3, 5), integers(5, 4), torch.zeros(4, 3, dtype=torch.int32)),
    ],
)
def test_shapes_that_do_not_fit(A, B, out):
    for call in (F.igemm, lambda A, B, out: F.check_matmul(A, B, out, False, False)):
        with pytest.raises(ValueError, match=r"^\w+: (?:B|out) must be .*, got (?:shape )?\["):
            call(A, B, out)


def test_other_dtypes_and_ranks_are_refused():
    with pytest.raises(TypeError, match=r"igemm: B must be torch\.int8, got torch\.float32"):
        F.igemm(integers(2, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="batched_igemm: A must have 3 dimensions"):
        F.batched_igemm(integers(2, 2), integers(2, 2))


def test_old_names_say_what_to_use():
    A = integers(1, 2, 2)
    for call in (
        lambda: F.igemm(A, A),
        lambda: F.batched_igemm(A, A),
        lambda: F.check_matmul(A, A, None, False, False),
    ):
        with pytest.warns(FutureWarning, match="int8_linear_matmul"):
            call()
