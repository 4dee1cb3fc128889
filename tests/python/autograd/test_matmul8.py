# SPDX-License-Identifier: MIT
"""The first interface of int8 training: both operands quantized, forward and backward."""

import inspect

import numpy as np
import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.autograd import _functions
from reference import legacy8 as reference


def numpy(tensor):
    return tensor.detach().cpu().double().numpy()


def product(a, b, quant_type):
    """The product of rounded operands, as the definition reads."""
    left, left_scales = reference.vectorwise(a, -1, quant_type)
    right, right_scales = reference.vectorwise(b, -2, quant_type)
    return (left @ right) * (left_scales / 127) * (right_scales / 127)


def turned(x):
    return np.swapaxes(x, -1, -2)


# With two batches the gradient of the second has one as well.
SHAPES = [((6, 40), (40, 5)), ((3, 6, 40), (40, 5)), ((3, 6, 40), (3, 40, 5))]


@pytest.mark.parametrize("quant_type", ["vector", "linear"])
@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_matches_specification(device, a, b, quant_type):
    # Quarters, so that no code lies next to the middle between two.
    A = (torch.randint(-40, 41, a, device=device) / 4).requires_grad_()
    B = (torch.randint(-40, 41, b, device=device) / 4).requires_grad_()
    out = bnb.matmul_cublas(A, B, None, quant_type)
    grad = torch.randint(-9, 10, out.shape, device=device).float()
    out.backward(grad)
    x, w, g = numpy(A), numpy(B), numpy(grad)
    left, right = (x, g) if len(b) == 3 else (x.reshape(-1, 40), g.reshape(-1, 5))
    for actual, want in (
        (out, product(x, w, quant_type)),
        (A.grad, product(g, turned(w), quant_type)),
        (B.grad, product(turned(left), right, quant_type)),
    ):
        assert actual.shape == want.shape
        np.testing.assert_allclose(numpy(actual), want, rtol=1e-4, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("exact", [0, 1, 2])
def test_precision_makes_a_product_exact(device, exact):
    A = torch.randn(6, 40, device=device, requires_grad=True)
    B = torch.randn(40, 5, device=device, requires_grad=True)
    precision = [8, 8, 8]
    precision[exact] = 16
    out = bnb.matmul_cublas(A, B, None, "vector", precision)
    grad = torch.randn(6, 5, device=device)
    out.backward(grad)
    results = (out, B.grad, A.grad)
    wanted = (A @ B, A.t() @ grad, grad @ B.t())
    for i, (result, want) in enumerate(zip(results, wanted, strict=True)):
        assert torch.allclose(result, want, atol=1e-5) == (i == exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype_and_fills_out(device, dtype):
    A, B = torch.eye(4, device=device, dtype=dtype), torch.eye(4, device=device, dtype=dtype) * 3
    out = torch.zeros(4, 4, device=device, dtype=dtype)
    assert bnb.mm_cublas(A, B, out) is out
    torch.testing.assert_close(out, B)


def test_only_wanted_gradients(device):
    A = torch.randn(3, 8, device=device)
    B = torch.randn(8, 4, device=device, requires_grad=True)
    bnb.matmul_cublas(A, B).sum().backward()
    assert A.grad is None and B.grad is not None


def test_names_and_bad_arguments():
    assert bnb.mm_cublas is bnb.bmm_cublas is bnb.matmul_cublas is _functions.matmul_cublas
    parameters = inspect.signature(bnb.matmul_cublas).parameters
    assert list(parameters) == ["A", "B", "out", "quant_type", "precision"]
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="quant_type must be one of vector, linear, got odd"):
        bnb.matmul_cublas(x, x, None, "odd")
    with pytest.raises(ValueError, match="precision must be three numbers"):
        bnb.matmul_cublas(x, x, None, "vector", [8])
    with pytest.raises(ValueError, match=r"matmul_cublas: B must be \[K, N\]"):
        bnb.matmul_cublas(x, torch.ones(3, 2))
