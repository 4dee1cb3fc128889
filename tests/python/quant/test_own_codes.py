# SPDX-License-Identifier: MIT
"""Codes of the caller: of any length, in any order, with levels that are no numbers."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitsandbytes.functional as F
from bitsandbytes.plain import quantize as plain
from reference import codes as reference

ops = torch.ops.bitsandbytes
NAN = float("nan")


@pytest.fixture(params=["dispatched", "plain"])
def blockwise(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain if request.param == "plain" else ops


def distinct_levels(generator, count):
    """Levels in random order, no two of which are neighbours as floats."""
    return generator.permutation(4096)[:count].astype(np.float32) / 2048 - 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 256),
    ascending=st.booleans(),
    holes=st.booleans(),
    n=st.integers(0, 3000),
    blocksize=st.sampled_from([32, 256, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_nearest_level_of_any_table(
    blockwise, device, count, ascending, holes, n, blocksize, dtype, seed
):
    generator = np.random.default_rng(seed)
    levels = distinct_levels(generator, count)
    if ascending:
        levels.sort()
    if holes and count > 1:
        levels[generator.integers(count)] = NAN
    a = torch.from_numpy(generator.standard_normal(n).astype(np.float32)).to(dtype)
    if n:
        a[generator.integers(n)] = generator.choice([NAN, float("inf"), 0.0])
    code = torch.from_numpy(levels).to(device)
    codes, absmax = blockwise.quantize_blockwise(a.to(device), code, blocksize)
    want, want_absmax = reference.quantize(levels, a.float().numpy(), blocksize)
    np.testing.assert_array_equal(absmax.cpu().numpy(), want_absmax)
    np.testing.assert_array_equal(codes.cpu().numpy(), want)
    codes = blockwise.quantize_no_absmax(a.to(device), code)
    np.testing.assert_array_equal(codes.cpu().numpy(), reference.encode(levels, a.float().numpy()))


STEPS = np.arange(-127.5, 128, dtype=np.float32) / np.float32(127.5)
TABLES = {
    "zero is a threshold": STEPS,
    "zero is a level": np.arange(-128, 128, dtype=np.float32) / 128,
    "levels above zero only": (STEPS + 1) / 2,
    "levels beyond 1": STEPS * 12,
    "dense around zero": STEPS**3,
    "dense elsewhere": np.float32(0.5) + STEPS / 1000,
    "a threshold near zero": STEPS + np.float32(1e-8),
    "descending": -STEPS,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TABLES)
def test_thresholds_of_any_table(blockwise, device, name, dtype):
    # Every block has 1 for its absmax: elements are compared as they are.
    levels = TABLES[name].astype(np.float32)
    ascending = np.sort(levels)
    middles = (ascending[:-1] + ascending[1:]) * np.float32(0.5)
    near = [np.nextafter(middles, np.float32(to)) for to in (-2, 2)]
    tiny = np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-9, -1e-9, 2e-7, -2e-7])
    values = np.concatenate([middles, *near, ascending, tiny, -tiny, -middles])
    a = np.resize(values[np.abs(values) <= 1], 20001)
    a[::64] = np.where(np.arange(a[::64].size) % 2, 1, -1)
    a = torch.from_numpy(a).to(dtype)
    a[640:704] = 0
    a[1290] = NAN
    code = torch.from_numpy(levels).to(device)
    codes, absmax = blockwise.quantize_blockwise(a.to(device), code, 64)
    want, want_absmax = reference.quantize(levels, a.float().numpy(), 64)
    np.testing.assert_array_equal(absmax.cpu().numpy(), want_absmax)
    np.testing.assert_array_equal(codes.cpu().numpy(), want)


@pytest.mark.parametrize("count", [1, 2, 16, 255, 256])
def test_every_instruction_set_takes_any_table(cpu_isa, count):
    generator = np.random.default_rng(count)
    levels = distinct_levels(generator, count)
    a = generator.standard_normal(5003).astype(np.float32)
    code = torch.from_numpy(levels)
    for blocksize in (17, 4096):
        codes, _ = ops.quantize_blockwise(torch.from_numpy(a), code, blocksize)
        np.testing.assert_array_equal(codes.numpy(), reference.quantize(levels, a, blocksize)[0])
    codes = ops.quantize_no_absmax(torch.from_numpy(a), code)
    np.testing.assert_array_equal(codes.numpy(), reference.encode(levels, a))


def few_bit_maps():
    for bits in range(2, 8):
        yield f"linear{bits}", F.create_linear_map(True, bits)
        yield f"unsigned linear{bits}", F.create_linear_map(False, bits)
        yield f"dynamic{bits}", F.create_dynamic_map(True, bits - 1, bits)
    yield "fp8", F.create_fp8_map()
    yield "fp4", F.create_fp8_map(True, 2, 1, 4)
    yield "normal", F.create_normal_map()


@pytest.mark.parametrize(("name", "code"), list(few_bit_maps()))
def test_padded_maps_give_the_nearest_level(blockwise, device, name, code):
    # Levels that occur twice: which of their codes is taken is another matter.
    a = torch.rand(4096, device=device) * 2 - 1
    if name.startswith("unsigned"):
        a = a.abs()
    a[0] = 1
    a[1:257] = code.to(device)
    codes, _ = blockwise.quantize_blockwise(a, code.to(device), 4096)
    chosen = code.to(device)[codes.long()].double()
    best = (code.to(device).double()[:, None] - a.double()).abs().amin(0)
    # The midpoint of two levels is rounded to float32.
    assert ((chosen - a.double()).abs() <= best + 2**-24).all()
    assert torch.equal(chosen[1:257].float(), code.to(device))


def test_codes_beyond_a_short_table_are_nan(blockwise, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    code = torch.tensor([-1.0, 0.5, 2.0], device=device)
    values = blockwise.dequantize_blockwise(
        codes, torch.full((4,), 3.0, device=device), code, 64, torch.float32
    )
    assert values[:3].tolist() == [-3, 1.5, 6]
    assert values[3:].isnan().all()
    assert F.dequantize_no_absmax(codes, code)[3:].isnan().all()


def test_table_in_any_strides_and_shape(blockwise, device):
    a = torch.randn(1000, device=device)
    wide = torch.rand(2, 20, device=device).sort().values * 2 - 1
    strided, square = wide[:, ::2], wide[:, ::2].contiguous()
    for way in (strided, square.view(4, 5)):
        got = blockwise.quantize_blockwise(a, way, 64)
        want = blockwise.quantize_blockwise(a, square.reshape(-1), 64)
        assert torch.equal(got[0], want[0])


def test_own_table_is_not_changed(device):
    code = torch.tensor([1.0, -1.0, 0.0, NAN], device=device)
    before = code.clone()
    codes, state = F.quantize_blockwise(torch.randn(100, device=device), code=code)
    F.dequantize_blockwise(codes, state)
    assert torch.equal(code[:3], before[:3]) and code[3].isnan()
    assert code._version == 0
    assert codes.max() <= 2
