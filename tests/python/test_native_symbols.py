# SPDX-License-Identifier: MIT
"""C symbols that programs call through ctypes, as unsloth does."""

import ctypes

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes import _library

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def stream(device, gpu_kernels, monkeypatch) -> ctypes.c_void_p:
    """The current stream as a C function takes it, where there are kernels to run on it."""
    if not gpu_kernels:
        pytest.skip("needs GPU kernels")
    if device == "cuda":
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    path = _library.libraries["_ops"].path  # of emulated kernels
    monkeypatch.setitem(
        _library.libraries, "_cuda", _library.Library("_cuda", "cuda", path, loaded=True)
    )
    return ctypes.c_void_p(None)


def pointers(*tensors):
    return [None if t is None else F.get_ptr(t) for t in tensors]


def sizes(*numbers):
    return [ctypes.c_int(n) for n in numbers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 1000, 4096])
def test_dequantize_by_pointers(dtype, n, device, stream):
    a = torch.randn(n, device=device, dtype=DTYPES[dtype])
    codes, state = F.quantize_blockwise(a, blocksize=256)
    out = torch.empty_like(a)
    function = F.lib[f"cdequantize_blockwise_{dtype}"]
    arguments = pointers(state.code, codes, state.absmax, out) + sizes(256, n)
    assert function(*arguments, stream) is None
    assert torch.equal(out, F.dequantize_blockwise(codes, state).to(a.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [2, 1002])
def test_dequantize_4bit_by_pointers(dtype, quant_type, n, device, stream):
    a = torch.randn(n, device=device, dtype=DTYPES[dtype])
    packed, state = F.quantize_4bit(a, quant_type=quant_type, blocksize=64)
    out = torch.empty_like(a)
    function = getattr(F.lib, f"cdequantize_blockwise_{dtype}_{quant_type}")
    function(*pointers(None, packed, state.absmax, out), *sizes(64, n), stream)
    assert torch.equal(out, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_by_pointers(dtype, device, stream):
    rows, k = 96, 192
    weight = torch.randn(rows, k, device=device, dtype=DTYPES[dtype])
    packed, state = F.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    a = torch.randn(1, 1, k, device=device, dtype=weight.dtype)
    out = torch.empty(1, 1, rows, device=device, dtype=weight.dtype)
    F.lib[f"cgemm_4bit_inference_naive_{dtype}"](
        *sizes(rows, 1, k),
        *pointers(a, packed, state.absmax, state.code, out),
        *sizes(rows, k // 2, rows, 64),
        stream,
    )
    expected = a.double() @ F.dequantize_4bit(packed, state).double().t()
    bound = 4e-7 * k if dtype == "fp32" else 16 * torch.finfo(weight.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound * k**0.5)


def test_arguments_that_cannot_be_right(device, stream):
    a = torch.zeros(64, device=device)
    dequantize = F.lib.cdequantize_blockwise_fp32_nf4
    with pytest.raises(RuntimeError, match=r"block_size must be a power of two.*got 63"):
        dequantize(*pointers(None, a, a, a), *sizes(63, 64), stream)
    with pytest.raises(RuntimeError, match="absmax must be a pointer to its elements, got null"):
        dequantize(*pointers(None, a, None, a), *sizes(64, 64), stream)
    with pytest.raises(RuntimeError, match="n must be 0 or more, got -1"):
        dequantize(*pointers(None, a, a, a), *sizes(64, -1), stream)
    multiply = F.lib.cgemm_4bit_inference_naive_fp32
    with pytest.raises(RuntimeError, match="n must be 1, a single row, got 2"):
        multiply(*sizes(1, 2, 64), *pointers(a, a, a, a, a), *sizes(1, 32, 1, 64), stream)
    with pytest.raises(RuntimeError, match="ldb must be k / 2, got 31"):
        multiply(*sizes(1, 1, 64), *pointers(a, a, a, a, a), *sizes(1, 31, 1, 64), stream)
    with pytest.raises(TypeError):  # without a stream, as before bitsandbytes 0.43
        dequantize(*pointers(None, a, a, a), *sizes(64, 64))
