# SPDX-License-Identifier: MIT
"""The public quantization functions, under the names that programs import."""

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
from .quant.codes import create_dynamic_map, create_linear_map, name2qmap
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
from .quant.state import QuantState
from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "GlobalPageManager",
    "QuantState",
    "_mul",
    "arange",
    "create_dynamic_map",
    "create_linear_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "elementwise_func",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "name2qmap",
    "optimizer_update_8bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "percentile_clipping",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]
