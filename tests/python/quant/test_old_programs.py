# SPDX-License-Identifier: MIT
"""Calls and states of 8-bit blockwise quantization as older programs make and hold them."""

import random

import pytest
import torch

import bitsandbytes.functional as F

A = torch.randn(9, 700)
CODE = F.create_linear_map()
RAND = torch.rand(1024)


def call(*args, **kwargs):
    """Codes and scales; the place where random numbers begin is the same in every call."""
    random.seed(0)
    codes, state = F.quantize_blockwise(*args, **kwargs)
    return codes, state


def outputs(blocksize=4096):
    return torch.zeros(-(-A.numel() // blocksize)), torch.zeros(9, 700, dtype=torch.uint8)


def test_positions_of_0_39_and_newer():
    absmax, out = outputs(64)
    want = call(A, CODE, blocksize=64)[0]
    codes, state = call(A, CODE, absmax, out, 64, True)
    assert codes is out and torch.equal(out, want) and state.nested and state.absmax is absmax
    codes, state = call(A, CODE, None, None, 64, False)
    assert torch.equal(codes, want) and not state.nested and state.blocksize == 64
    assert torch.equal(call(A, CODE, None, None, 64)[0], want)
    codes, _ = call(A, CODE, absmax[:2].clone(), out)
    assert codes is out and torch.equal(out, call(A, CODE)[0])


def test_positions_of_0_0_24_to_0_38():
    absmax, out = outputs()
    want = call(A, CODE, rand=RAND)[0]
    assert not torch.equal(want, call(A, CODE)[0])
    codes, state = call(A, CODE, absmax, RAND, out)
    assert codes is out and torch.equal(out, want) and state.absmax is absmax
    assert torch.equal(call(A, CODE, None, RAND)[0], want)
    codes, state = call(A, CODE, None, RAND, None, 2048)
    assert state.blocksize == 2048
    assert torch.equal(codes, call(A, CODE, blocksize=2048, rand=RAND)[0])
    nearest = call(A, CODE)[0]
    codes, _ = call(A, CODE, absmax, None, out)
    assert codes is out and torch.equal(out, nearest)
    codes, state = call(A, CODE, None, None, out, 2048)
    assert codes is out and state.blocksize == 2048 and not state.nested
    codes, state = call(A, CODE, None, None, None, 2048)
    assert state.blocksize == 2048
    assert torch.equal(
        call(A, CODE, None, RAND, blocksize=2048)[0], call(A, CODE, blocksize=2048, rand=RAND)[0]
    )


def test_a_float_tensor_by_keyword_is_still_no_output():
    with pytest.raises(ValueError, match=r"out must be torch.uint8"):
        F.quantize_blockwise(A, out=torch.zeros(9, 700))


def test_too_many_positions():
    with pytest.raises(TypeError, match=r"positional"):
        F.quantize_blockwise(A, CODE, None, None, 64, False, RAND)


def test_scales_are_the_first_entry_of_a_state(device):
    # bitsandbytes 0.0.24 returned (absmax, code), later ones a list or a state.
    _, state = F.quantize_blockwise(A.to(device))
    assert state[0] is state.absmax


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("blocksize", [64, 2048])
def test_pair(device, kind, blocksize):
    codes, state = F.quantize_blockwise(A.to(device).half(), blocksize=blocksize)
    values = F.dequantize_blockwise(codes, kind([state.absmax, state.code]), blocksize=blocksize)
    # The pair knows no dtype.
    assert values.dtype == torch.float32
    assert torch.equal(values.half(), F.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("inner", ["list", "state", "pair"])
def test_list_of_seven(device, dtype, nested, inner):
    a = A.to(device).to(dtype)
    codes, state = F.quantize_blockwise(a, blocksize=128, nested=nested)
    state2 = state.state2
    if nested and inner == "list":
        state2 = [state2.absmax, state2.code, 128, False, torch.float32, None, None]
    elif nested and inner == "pair":
        state2 = (state2.absmax, state2.code)
    old = [state.absmax, state.code, 128, nested, dtype, state.offset, state2]
    values = F.dequantize_blockwise(codes, old)
    assert values.dtype == dtype
    assert torch.equal(values, F.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("length", [0, 1, 3, 6, 8])
def test_list_of_another_length(length):
    with pytest.raises(ValueError, match=rf"a list of 2 or 7 entries, got {length} entries"):
        F.dequantize_blockwise(torch.zeros(3, dtype=torch.uint8), [None] * length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_decides_the_dtype_where_no_state_does(device, dtype):
    codes, state = F.quantize_blockwise(A.to(device).to(dtype))
    out = torch.zeros(9, 700, dtype=dtype, device=device)
    want = F.dequantize_blockwise(codes, state)
    for arguments in ({"quant_state": (state.absmax, state.code)}, {"absmax": state.absmax}):
        out.zero_()
        assert F.dequantize_blockwise(codes, **arguments, out=out) is out
        assert torch.equal(out, want)
    # Without a state dtype there is one way for integers to come back: an error.
    with pytest.raises(ValueError, match=r"out must be torch.float32"):
        F.dequantize_blockwise(codes, absmax=state.absmax, out=torch.zeros(9, 700).int())
