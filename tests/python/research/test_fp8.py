# SPDX-License-Identifier: MIT
"""Products of operands rounded to FP8, against the same in float64."""

import inspect

import numpy as np
import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import create_fp8_map
from bitsandbytes.research import matmul_fp8_global, matmul_fp8_mixed
from bitsandbytes.research.autograd import _functions
from bitsandbytes.research.fp8 import block_size_of
from bitsandbytes.research.nn import LinearFP8Global, LinearFP8Mixed, modules
from reference import legacy8 as reference

FORWARD, BACKWARD = create_fp8_map(True, 4, 3, 8), create_fp8_map(True, 5, 2, 8)


def numpy(tensor):
    return tensor.detach().cpu().double().numpy()


def rounded(x, code, block):
    return reference.round_to_levels(x, code.numpy(), block)


def near(actual, want):
    assert actual.shape == want.shape
    np.testing.assert_allclose(numpy(actual), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_mixed_matches_specification(device, lead):
    A = torch.randn(*lead, 130, device=device, requires_grad=True)
    B = torch.randn(130, 20, device=device, requires_grad=True)
    out = matmul_fp8_mixed(A, B, FORWARD.to(device), BACKWARD.to(device))
    grad = torch.randn_like(out)
    out.backward(grad)
    a, b, g = numpy(A).reshape(6, 130), numpy(B), numpy(grad).reshape(6, 20)
    weight = rounded(b, FORWARD, None)
    # 130 numbers take blocks of 256, 20 blocks of 64, over all rows.
    near(out.reshape(6, 20), rounded(a, FORWARD, 256) @ weight)
    near(A.grad.reshape(6, 130), rounded(g, BACKWARD, 64) @ weight.T)
    near(B.grad, a.T @ g)


def test_block_sizes_can_be_chosen(device):
    A, B = torch.randn(4, 100, device=device), torch.randn(100, 3, device=device)
    code = FORWARD.to(device)
    out = torch.zeros(4, 3, device=device)
    assert matmul_fp8_mixed(A, B, code, code, out, 64, 64) is out
    near(out, rounded(numpy(A), FORWARD, 64) @ rounded(numpy(B), FORWARD, None))


def test_global_matches_specification(device):
    A = torch.randn(6, 130, device=device, requires_grad=True)
    B = torch.randn(130, 20, device=device, requires_grad=True)
    out = matmul_fp8_global(A, B, FORWARD.to(device), BACKWARD.to(device))
    grad = torch.randn_like(out)
    out.backward(grad)
    left, right = rounded(numpy(A), FORWARD, None), rounded(numpy(B), FORWARD, None)
    gradient = rounded(numpy(grad), BACKWARD, None)
    near(out, left @ right)
    near(A.grad, gradient @ right.T)
    near(B.grad, left.T @ gradient)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", [LinearFP8Mixed, LinearFP8Global])
def test_layers_are_the_products(device, cls, bias):
    layer = cls(100, 20, bias).to(device)
    assert (layer.bsz, layer.bsz2, layer.fw_code, layer.bw_code) == (128, 64, None, None)
    x = torch.randn(5, 100, device=device, requires_grad=True)
    out = layer(x)
    assert torch.equal(layer.fw_code.cpu(), FORWARD) and torch.equal(layer.bw_code.cpu(), BACKWARD)
    verb = matmul_fp8_mixed if cls is LinearFP8Mixed else matmul_fp8_global
    want = verb(x, layer.weight.t(), layer.fw_code, layer.bw_code)
    torch.testing.assert_close(out, want + layer.bias if bias else want)
    out.sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    assert list(inspect.signature(cls).parameters) == ["input_features", "output_features", "bias"]


def test_block_size_holds_a_row():
    sizes = {1: 64, 64: 64, 65: 128, 128: 128, 129: 256, 1000: 1024, 4096: 4096, 5000: 4096}
    assert {features: block_size_of(features) for features in sizes} == sizes


def test_names_and_bad_arguments():
    assert _functions.matmul_fp8_mixed is matmul_fp8_mixed is bnb.research.matmul_fp8_mixed
    assert modules.LinearFP8Mixed is LinearFP8Mixed
    names = ["A", "B", "fw_code", "bw_code", "out", "bsz", "bsz2"]
    for verb in (matmul_fp8_mixed, matmul_fp8_global):
        assert list(inspect.signature(verb).parameters) == names
        with pytest.raises(ValueError, match=rf"{verb.__name__}: B must be \[K, N\]"):
            verb(torch.ones(2, 3), torch.ones(2, 3), FORWARD, BACKWARD)
