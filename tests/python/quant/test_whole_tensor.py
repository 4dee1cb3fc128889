# SPDX-License-Identifier: MIT
"""Quantization with one scale for a tensor, or with none."""

import warnings

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.plain import quantize as plain
from reference import codes as reference

ops = torch.ops.bitsandbytes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")
LEVELS = reference.dynamic_map(True)
CODE = torch.from_numpy(LEVELS.copy())
# Ascending levels beyond [-1, 1].
WIDE = np.sort(np.random.default_rng(1).standard_normal(256) * 100).astype(np.float32)


def numpy(tensor):
    return tensor.detach().cpu().float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [LEVELS, reference.dynamic_map(False), WIDE])
@pytest.mark.parametrize("function", [F.quantize_no_absmax, plain.quantize_no_absmax])
def test_codes_without_scale(device, function, dtype, levels):
    a = torch.randn(3, 1717) * 60
    a[0, :9] = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-45, 3e38, -3e38, 1.0])
    a = a.to(dtype)
    codes = function(a.to(device), torch.from_numpy(levels.copy()).to(device))
    assert codes.dtype == torch.uint8 and codes.shape == a.shape
    np.testing.assert_array_equal(codes.cpu().numpy(), reference.encode(levels, numpy(a)))
    assert codes[0, :3].tolist() == [0, 255, 0]


@pytest.mark.parametrize("levels", [LEVELS, WIDE])
def test_every_threshold_without_scale(cpu_isa, levels):
    middle = reference.midpoints(levels)
    a = np.concatenate([np.nextafter(middle, np.float32(d)) for d in (-INF, INF)] + [middle])
    codes = F.quantize_no_absmax(torch.from_numpy(a), torch.from_numpy(levels.copy()))
    np.testing.assert_array_equal(codes.numpy(), reference.encode(levels, a))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 11)])
def test_shapes_and_strides(device, shape):
    a = torch.randn(shape, device=device)
    assert F.quantize_no_absmax(a, CODE).shape == shape  # the code is brought to A
    wide = torch.randn(40, 50, device=device)
    for view in (wide.t(), wide[:, ::2], wide[3:]):
        got = F.quantize_no_absmax(view, CODE)
        assert torch.equal(got, F.quantize_no_absmax(view.contiguous(), CODE))
    codes, state = F.quantize(a)
    assert codes.shape == shape and state[0].shape == () and state[0].dtype == torch.float32
    assert F.dequantize(codes, state).shape == shape


def test_levels_of_codes(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(16, 16).t()
    values = F.dequantize_no_absmax(codes, CODE)
    np.testing.assert_array_equal(numpy(values), LEVELS.reshape(16, 16).T)
    odd = CODE.clone()
    odd[:3] = torch.tensor([-0.0, INF, NAN])
    values = F.dequantize_no_absmax(codes, odd)
    assert values.flatten()[0].signbit() and values[1, 0] == INF and values[2, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_scale(device, dtype):
    a = (torch.randn(3, 1717) * 5).to(dtype)
    codes, (absmax, code) = F.quantize(a.to(device))
    values = numpy(a)
    most = np.abs(values).max()
    assert absmax.item() == most and code.device == codes.device
    np.testing.assert_array_equal(codes.cpu().numpy(), reference.encode(LEVELS, values / most))
    back = F.dequantize(codes, (absmax, code))
    want = LEVELS[codes.cpu().numpy()] * most
    assert back.dtype == torch.float32
    np.testing.assert_array_equal(numpy(back), want)


def test_own_code_and_shared_table(device):
    a = torch.randn(1000, device=device)
    codes, (absmax, code) = F.quantize(a, torch.from_numpy(WIDE.copy()))
    np.testing.assert_array_equal(
        codes.cpu().numpy(), reference.encode(WIDE, numpy(a) / np.float32(absmax.item()))
    )
    assert torch.equal(code.cpu(), torch.from_numpy(WIDE.copy()))
    _, (_, shared) = F.quantize(a)
    shared.zero_()
    assert F.quantize(a)[1][1].any()


def test_scale_of_zeros_and_of_what_is_not_finite(device):
    codes, state = F.quantize(torch.zeros(5, device=device))
    assert not codes.any() and state[0] == 0 and not F.dequantize(codes, state).any()
    codes, state = F.quantize(torch.tensor([1.0, NAN], device=device))
    assert F.dequantize(codes, state).isnan().all()


def test_forms_of_the_state(device):
    codes, state = F.quantize(torch.randn(100, device=device))
    want = F.dequantize(codes, state)
    absmax, code = state
    assert torch.equal(F.dequantize(codes, quant_state=state), want)
    assert torch.equal(F.dequantize(codes, state=state), want)
    assert torch.equal(F.dequantize(codes, None, absmax), want)
    assert torch.equal(F.dequantize(codes, absmax=absmax, code=code), want)
    assert torch.equal(F.dequantize(codes, list(state), absmax * 0), want)


def test_given_tensors(device):
    a = torch.randn(40, 50, device=device)
    out = torch.zeros(40, 50, dtype=torch.uint8, device=device)
    codes, state = F.quantize(a, out=out)
    assert codes is out and torch.equal(out, F.quantize(a)[0])
    assert F.quantize_no_absmax(a, CODE, out) is out
    assert torch.equal(out, F.quantize_no_absmax(a, CODE))
    levels = torch.zeros(40, 50, device=device)
    values = F.dequantize(codes, state, out=levels)
    # `out` receives what is not scaled yet, as in the public package.
    assert torch.equal(levels, F.dequantize_no_absmax(codes, state[1]))
    assert torch.equal(values, levels * state[0]) and values is not levels
    assert F.dequantize_no_absmax(codes, CODE, levels) is levels


BAD = [
    ("A", F.quantize, (torch.ones(3, dtype=torch.float64),)),
    ("out", F.quantize, (torch.ones(3), None, torch.ones(3))),
    ("A", F.quantize_no_absmax, (torch.ones(3, dtype=torch.int32), CODE)),
    ("out", F.quantize_no_absmax, (torch.ones(3), CODE, torch.ones(2, dtype=torch.uint8))),
    ("A", F.dequantize_no_absmax, (torch.ones(3), CODE)),
    ("out", F.dequantize_no_absmax, (torch.ones(3, dtype=torch.uint8), CODE, torch.ones(2))),
    ("code", F.quantize_no_absmax, (torch.ones(3), torch.ones(257))),
    ("code", F.quantize_no_absmax, (torch.ones(3), CODE.double())),
    ("code", plain.quantize_no_absmax, (torch.ones(3), CODE[:0])),
]


@pytest.mark.parametrize(("argument", "function", "args"), BAD)
def test_bad_argument_gets_a_sentence(argument, function, args):
    sentence = rf"^(de)?quantize\w*: .*\b{argument} .*, got "
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        function(*args)


def test_dequantize_without_a_scale():
    with pytest.raises(AssertionError, match=r"quant_state or absmax must be given, got neither"):
        F.dequantize(torch.zeros(3, dtype=torch.uint8))


def test_acceptance(device):
    # The public package's bounds on the error of a round trip.
    for a, mean, most in (
        (torch.randn(1024, 1024, device=device), 0.0135, None),
        (torch.rand(1024, 1024, device=device), 0.004, 1e-2),
    ):
        error = (F.dequantize(*F.quantize(a)) - a).abs()
        assert error.mean() < mean
        assert most is None or error.max() < most


def test_no_warnings(device):
    # Compat: the public package announces the end of these functions; here they stay.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes, state = F.quantize(torch.randn(300, device=device))
        F.dequantize(codes, state)
        F.estimate_quantiles(torch.randn(300, device=device))


def test_compiles_into_one_graph(device):
    def round_trip(x):
        return F.dequantize(*F.quantize(x)) + F.dequantize_no_absmax(
            F.quantize_no_absmax(x, code), code
        )

    code = CODE.to(device)
    x = torch.randn(700, device=device)
    want = round_trip(x)
    assert torch.equal(torch.compile(round_trip, fullgraph=True, backend="aot_eager")(x), want)
