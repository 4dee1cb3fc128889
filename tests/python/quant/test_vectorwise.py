# SPDX-License-Identifier: MIT
"""int8 quantization of vectors in the variants of the first releases."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
from reference import legacy8 as reference

SYMMETRIC = ["linear", "vector", "row", "truncated-vector"]
ZEROPOINT = ["zeropoint", "vector-zeropoint", "row-zeropoint"]


def numpy(tensor):
    return tensor.detach().cpu().double().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("quant_type", SYMMETRIC + ZEROPOINT)
def test_quant_matches_specification(device, quant_type, dim, dtype):
    x = torch.randn(9, 30, device=device).to(dtype)
    before = x.clone()
    codes, scales = F.vectorwise_quant(x, dim, quant_type)
    want, want_scales = reference.vectorwise(numpy(x), dim, quant_type)
    assert torch.equal(x, before)
    assert codes.dtype == (torch.int8 if quant_type in SYMMETRIC else torch.float32)
    assert scales.dtype == torch.float32 and scales.shape == np.shape(want_scales)
    np.testing.assert_allclose(numpy(scales), want_scales, rtol=1e-6)
    # Where float32 falls on the other side of the middle between two codes.
    assert np.abs(numpy(codes) - want).max() <= 1
    assert (numpy(codes) != want).mean() < 0.02


def test_quant_of_zeros_and_constants(device):
    x = torch.zeros(2, 4, device=device)
    for quant_type in SYMMETRIC:
        assert not F.vectorwise_quant(x, 1, quant_type)[0].any()
    codes, factor = F.vectorwise_quant(x + 3, 1, "vector-zeropoint")
    torch.testing.assert_close(codes / factor, x + 3)


@pytest.mark.parametrize("quant_type", SYMMETRIC)
def test_dequant_is_the_inverse(device, quant_type):
    x = torch.rand(5, 40, device=device) - 0.5
    codes, scales = F.vectorwise_quant(x, 1, quant_type)
    back = F.vectorwise_dequant(codes, scales, quant_type)
    bound = scales.expand_as(x) if quant_type == "truncated-vector" else x
    assert (back - x.clamp(-bound.abs(), bound.abs())).abs().max() <= scales.max() / 254 * 1.001


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("quant_type", SYMMETRIC + ZEROPOINT)
def test_product_of_codes_is_the_product(device, quant_type, lead):
    a, b = torch.randn(*lead, 6, 64, device=device), torch.randn(64, 5, device=device)
    right = b.t() if quant_type == "vector-zeropoint" else b
    left_codes, S1 = F.vectorwise_quant(a, -1, quant_type)
    right_codes, S2 = F.vectorwise_quant(right, 1 if right is not b else 0, quant_type)
    if right is not b:
        right_codes = right_codes.t()
    if quant_type == "row-zeropoint":
        right_codes, S2 = F.vectorwise_quant(b, 0, "row-zeropoint")
    product = left_codes.double() @ right_codes.double()
    values = F.vectorwise_mm_dequant(product, S1, S2, torch.float32, quant_type)
    assert values.shape == (*lead, 6, 5) and values.dtype == torch.float32
    exact = numpy(a) @ numpy(b)
    if quant_type == "truncated-vector":
        bounded = [
            reference.vectorwise(numpy(x), axis, quant_type) for x, axis in ((a, -1), (b, 0))
        ]
        exact = (bounded[0][0] * bounded[0][1] / 127) @ (bounded[1][0] * bounded[1][1] / 127)
    assert np.abs(numpy(values) - exact).max() < 0.02 * 64**0.5 * np.abs(numpy(a)).max()
    assert np.corrcoef(numpy(values).ravel(), exact.ravel())[0, 1] > 0.999
    if lead:
        # Scales of a batch of one with a product of two dimensions.
        flat = F.vectorwise_mm_dequant(
            product[0], S1[:1] if S1.dim() else S1, S2, quant_type=quant_type
        )
        torch.testing.assert_close(flat, values[0].half())


def test_dequant_min_max(device):
    a, b = torch.rand(6, 50, device=device) * 3 - 2, torch.randn(4, 50, device=device)
    low, reach = a.amin(), a.amax() - a.amin()
    # Codes of the left operand count from the greatest number down.
    left = torch.round((a - low - reach) / reach * 127)
    right, scales = F.vectorwise_quant(b)
    for stats in (scales, scales.flatten()):
        product = left.double() @ right.double().t()
        values = F.dequant_min_max(product, a, b, (low, reach), stats, torch.float32)
        np.testing.assert_allclose(numpy(values), numpy(a) @ numpy(b).T, atol=0.4)
    assert F.dequant_min_max(product, a, b, (low, reach), scales).dtype == torch.float16


@pytest.mark.parametrize("name", ["quant", "dequant", "mm_dequant"])
def test_unknown_variants_are_refused(name):
    x = torch.ones(2, 2)
    calls = {
        "quant": lambda: F.vectorwise_quant(x, 1, "odd"),
        "dequant": lambda: F.vectorwise_dequant(x, x, "zeropoint"),
        "mm_dequant": lambda: F.vectorwise_mm_dequant(x, x, x, quant_type="odd"),
    }
    with pytest.raises(ValueError, match=rf"vectorwise_{name}: quant_type must be one of .*, got "):
        calls[name]()
