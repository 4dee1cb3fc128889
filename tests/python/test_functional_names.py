# SPDX-License-Identifier: MIT
"""What programs find in `bitsandbytes.functional`: names, signatures, helpers."""

import copy
import ctypes
import inspect
import subprocess
import sys

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes import cextension

# Positional parameters of the last public release that had the function.
SIGNATURES = {
    "quantize_blockwise": "A, code=None, absmax=None, out=None, blocksize=4096, nested=False",
    "dequantize_blockwise": "A, quant_state=None, absmax=None, code=None, out=None, "
    "blocksize=4096, nested=False",
    "quantize": "A, code=None, out=None",
    "dequantize": "A, quant_state=None, absmax=None, code=None, out=None",
    "quantize_no_absmax": "A, code, out=None",
    "dequantize_no_absmax": "A, code, out=None",
    "estimate_quantiles": "A, out=None, offset=0.001953125, num_quantiles=256",
    "create_quantile_map": "A, total_bits=8",
    "histogram_scatter_add_2d": "histogram, index1, index2, source",
    "create_linear_map": "signed=True, total_bits=8, add_zero=True",
    "create_normal_map": "offset=0.9677083, use_extra_value=True",
    "create_fp8_map": "signed=True, exponent_bits=5, precision_bits=2, total_bits=8",
    "create_dynamic_map": "signed=True, max_exponent_bits=7, total_bits=8",
    "get_ptr": "A",
    "is_on_gpu": "tensors",
    "prefetch_tensor": "A, to_cpu=False",
    "elementwise_func": "func_name, A, B, value, prefetch=True",
    "fill": "A, value, device=None, prefetch=True",
    "_mul": "A, B, device=None",
    "arange": "A, device=None",
    "has_avx512bf16": "",
    "_get_tensor_stream": "tensor",
    "_cuda_device_of": "a",
    "_convert_weight_packed_for_cpu": "qweight, quant_state, block_n=32",
    "_convert_weight_packed_for_cpu_inverse": "packed_weight, quant_state, block_n=32",
    "int8_vectorwise_quant": "A, threshold=0.0",
    "int8_vectorwise_dequant": "A, stats",
    "int8_linear_matmul": "A, B, out=None, dtype=torch.int32",
    "int8_mm_dequant": "A, row_stats, col_stats, out=None, bias=None",
    "int8_double_quant": "A, col_stats=None, row_stats=None, out_col=None, out_row=None, "
    "threshold=0.0",
    "double_quant": "A, col_stats=None, row_stats=None, out_col=None, out_row=None, threshold=0.0",
    "get_colrow_absmax": "A, row_stats=None, col_stats=None, nnz_block_ptr=None, threshold=0.0",
    "check_matmul": "A, B, out, transposed_A, transposed_B, expected_type=torch.int8",
    "igemm": "A, B, out=None, transposed_A=False, transposed_B=False",
    "batched_igemm": "A, B, out=None, transposed_A=False, transposed_B=False",
    "igemmlt": "A, B, SA, SB, out=None, Sout=None, dtype=torch.int32",
    "mm_dequant": "A, quant_state, row_stats, col_stats, out=None, new_row_stats=None, "
    "new_col_stats=None, bias=None",
    "get_special_format_str": "",
    "get_transform_buffer": "shape, dtype, device, to_order, from_order=row, transpose=False",
    "transform": "A, to_order, from_order=row, out=None, transpose=False, state=None, ld=None",
    "nvidia_transform": "A, to_order, from_order=row, out=None, transpose=False, state=None, "
    "ld=None",
    "extract_outliers": "A, SA, idx",
    "vectorwise_quant": "x, dim=1, quant_type=vector",
    "vectorwise_dequant": "xq, max1, quant_type=vector",
    "vectorwise_mm_dequant": "xq, S1, S2, dtype=torch.float16, quant_type=vector",
    "dequant_min_max": "xq, A, B, SA, SB, dtype=torch.float16",
    "COOSparseTensor": "rows, cols, nnz, rowidx, colidx, values",
    "CSRSparseTensor": "rows, cols, nnz, rowptr, colidx, values",
    "CSCSparseTensor": "rows, cols, nnz, colptr, rowidx, values",
    "coo_zeros": "rows, cols, nnz, device, dtype=torch.float16",
    "coo2csr": "cooA",
    "coo2csc": "cooA",
    "spmm_coo": "cooA, B, out=None",
    "spmm_coo_very_sparse": "cooA, B, dequant_stats=None, out=None",
    "pipeline_test": "A, batch_size",
    "pre_call": "device",
    "post_call": "prev_device",
}
OTHERS = (
    "C FIRST_CUDA_DEVICE lib name2qmap dtype2bytes QuantState GlobalPageManager CUBLAS_Context "
    "ct itertools np torch Tensor prod deprecated pack_dict_to_tensor unpack_tensor_to_dict Any "
    "Optional Iterable get_paged"
).split()


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(F, name)).parameters.values()
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert ", ".join(shown) == SIGNATURES[name]


@pytest.mark.parametrize("name", OTHERS)
def test_name(name):
    assert getattr(F, name) is not None


def test_values():
    assert F.C == 127.0 and torch.device("cuda", 0) == F.FIRST_CUDA_DEVICE
    assert F.ct is ctypes and F.torch is torch and F.Tensor is torch.Tensor and F.prod((2, 3)) == 6
    for dtype, size in F.dtype2bytes.items():
        assert dtype.itemsize == size
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = F.no_such_name


def test_numpy_is_imported_when_asked_for():
    code = """
import sys
sys.modules["numpy"] = sys.modules["scipy"] = None
import warnings
warnings.simplefilter("ignore")
import bitsandbytes.functional as F
F.create_normal_map()
try:
    F.np
except ImportError:
    print("not there")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "not there", process.stderr


# --- around native code -------------------------------------------------------------------------


def test_pointer(device):
    a = torch.zeros(4, device=device)
    assert F.get_ptr(None) is None
    assert isinstance(F.get_ptr(a), ctypes.c_void_p) and F.get_ptr(a).value == a.data_ptr()
    assert F.get_ptr(a[1:]).value == a.data_ptr() + 4


def test_pointer_reads_what_the_tensor_holds():
    a = torch.arange(4.0)
    assert ctypes.cast(F.get_ptr(a), ctypes.POINTER(ctypes.c_float))[3] == 3


def test_stream(device):
    stream = F._get_tensor_stream(torch.zeros(1, device=device))
    assert isinstance(stream, ctypes.c_void_p)
    if device == "cuda":
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            stream = F._get_tensor_stream(torch.zeros(1, device=device))
        assert stream.value == other.cuda_stream


def test_stream_of_a_device_without_streams():
    with pytest.raises(ValueError, match=r"tensor must be on cpu, cuda or xpu, got meta"):
        F._get_tensor_stream(torch.zeros(1, device="meta"))


def test_device_context(device):
    with F._cuda_device_of(torch.zeros(1, device=device)):
        pass
    if device == "cuda":
        before = F.pre_call(torch.device("cuda", 0))
        F.post_call(before)
        assert torch.cuda.current_device() == before.index


def test_cublas_context(device):
    with pytest.raises(RuntimeError, match="get_instance"):
        F.CUBLAS_Context()
    context = F.CUBLAS_Context.get_instance()
    assert context is F.CUBLAS_Context.get_instance()
    if device == "cuda":
        handle = context.get_context(torch.device("cuda", 0))
        assert handle.value and handle is context.get_context(torch.device("cuda"))


def test_copy(device):
    a = torch.randn(10, device=device)
    copied = F.pipeline_test(a, 4)
    assert torch.equal(copied, a) and copied.data_ptr() != a.data_ptr()


# --- the library object -------------------------------------------------------------------------


def test_symbols_exist_and_say_what_to_do_when_called():
    # Programs collect C symbols when they are imported, and may never call them.
    for symbol in (F.lib.cadam32bit_grad_fp32, F.lib["cadam32bit_grad_fp32"]):
        with pytest.raises(RuntimeError, match=r"cadam32bit_grad_fp32.*bitsandbytes"):
            symbol(1, 2, x=3)
    assert F.lib is cextension.lib
    assert F.lib.compiled_with_cuda == bnb._library.libraries["_cuda"].loaded
    assert not hasattr(F.lib, "__len__")
    assert isinstance(copy.copy(F.lib), cextension.NativeLibrary)


def test_facts_of_the_backend():
    assert cextension.COMPILED_WITH_CUDA is bnb.COMPILED_WITH_CUDA is F.lib.compiled_with_cuda
    assert cextension.HIP_ENVIRONMENT is (torch.version.hip is not None)
    assert cextension.BNB_BACKEND in ("CPU", "CUDA", "ROCm", "XPU")
    assert (cextension.BNB_BACKEND in ("CUDA", "ROCm")) >= torch.cuda.is_available()
    assert cextension.ROCM_GPU_ARCH == "unknown" or torch.version.hip
    with pytest.raises(AttributeError):
        _ = cextension.no_such_name
