# SPDX-License-Identifier: MIT
"""The public quantization functions, under the names that programs import."""

import ctypes as ct
import importlib
import itertools
from collections.abc import Iterable
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor

from .cextension import lib
from .handles import (
    FIRST_CUDA_DEVICE,
    CUBLAS_Context,
    _cuda_device_of,
    _get_tensor_stream,
    dtype2bytes,
    get_ptr,
    pipeline_test,
    post_call,
    pre_call,
)
from .optim.functional import (
    is_on_gpu,
    optimizer_update_8bit,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    percentile_clipping,
)
from .paged import (
    GlobalPageManager,
    _mul,
    arange,
    elementwise_func,
    fill,
    get_paged,
    prefetch_tensor,
)
from .quant.blockwise import dequantize_blockwise, quantize_blockwise
from .quant.codes import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    name2qmap,
)
from .quant.cpu_packing import (
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    has_avx512bf16,
)
from .quant.double import double_quant, get_colrow_absmax, get_row_absmax, int8_double_quant
from .quant.four_bit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    get_4bit_type,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from .quant.int8 import (
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from .quant.integer import batched_igemm, check_matmul, igemm
from .quant.layouts import (
    extract_outliers,
    get_special_format_str,
    get_transform_buffer,
    igemmlt,
    mm_dequant,
    nvidia_transform,
    transform,
)
from .quant.quantiles import create_quantile_map, estimate_quantiles, histogram_scatter_add_2d
from .quant.sparse import (
    COOSparseTensor,
    CSCSparseTensor,
    CSRSparseTensor,
    coo2csc,
    coo2csr,
    coo_zeros,
    spmm_coo,
    spmm_coo_very_sparse,
)
from .quant.state import QuantState
from .quant.tensorwise import dequantize, dequantize_no_absmax, quantize, quantize_no_absmax
from .quant.vectorwise import (
    dequant_min_max,
    vectorwise_dequant,
    vectorwise_mm_dequant,
    vectorwise_quant,
)
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "FIRST_CUDA_DEVICE",
    "Any",
    "C",
    "COOSparseTensor",
    "CSCSparseTensor",
    "CSRSparseTensor",
    "CUBLAS_Context",
    "GlobalPageManager",
    "Iterable",
    "Optional",
    "QuantState",
    "Tensor",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "_cuda_device_of",
    "_get_tensor_stream",
    "_mul",
    "arange",
    "batched_igemm",
    "check_matmul",
    "coo2csc",
    "coo2csr",
    "coo_zeros",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "create_quantile_map",
    "ct",
    "dequant_min_max",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "dequantize_no_absmax",
    "double_quant",
    "dtype2bytes",
    "elementwise_func",
    "estimate_quantiles",
    "extract_outliers",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_colrow_absmax",
    "get_paged",
    "get_ptr",
    "get_row_absmax",
    "get_special_format_str",
    "get_transform_buffer",
    "has_avx512bf16",
    "histogram_scatter_add_2d",
    "igemm",
    "igemmlt",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "itertools",
    "lib",
    "mm_dequant",
    "name2qmap",
    "nvidia_transform",
    "optimizer_update_8bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "percentile_clipping",
    "pipeline_test",
    "post_call",
    "pre_call",
    "prefetch_tensor",
    "prod",
    "quantize",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "quantize_no_absmax",
    "spmm_coo",
    "spmm_coo_very_sparse",
    "torch",
    "transform",
    "unpack_tensor_to_dict",
    "vectorwise_dequant",
    "vectorwise_mm_dequant",
    "vectorwise_quant",
]

C = 127.0


def __getattr__(name: str):
    # Compat: names of other packages that the public module shows. Imported when asked for: NumPy
    # may not be there.
    if name == "np":
        return importlib.import_module("numpy")
    if name == "deprecated":
        return importlib.import_module("typing_extensions").deprecated
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
