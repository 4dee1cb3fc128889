# SPDX-License-Identifier: MIT
"""The packing of 4-bit weights for AVX-512-BF16 that the public package uses on some CPUs.

Compat: nothing here needs it, since :func:`has_avx512bf16` says no: 4-bit weights keep one layout.
The conversions are kept for programs that hold such weights.
"""

import torch
from torch import Tensor

from .blockwise import dequantize_blockwise, quantize_blockwise
from .state import QuantState

__all__ = [
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "has_avx512bf16",
]

NESTED_BLOCKSIZE = 256


def has_avx512bf16() -> bool:
    """Returns False: no kernel of this package wants weights in another packing."""
    return False


def _convert_weight_packed_for_cpu(
    qweight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """Packs a 4-bit weight in groups of `block_n` rows, with scales in bfloat16.

    A byte then holds one column of two rows: for rows r and columns 2c, 2c + 1 of a group, the
    codes are put in the order of r, then of the column; byte j of a column pair holds code j in its
    low half and code ``j + block_n`` in its high half.

    Args:
        qweight: Packed codes of a weight ``[N, K]`` in any storage dtype; N a multiple of
            `block_n`, K even and a multiple of the block size.
        quant_state: Its state, which is changed in place: `absmax` becomes bfloat16
            ``[K / blocksize, N]`` and not nested.
        block_n: Rows of a group.

    Returns:
        uint8 ``[N, K / 2]``, and `quant_state`.

    Raises:
        AssertionError: The shape does not fit.
    """
    name = "_convert_weight_packed_for_cpu"
    shape = tuple(quant_state.shape)
    assert len(shape) == 2, f"{name}: quant_state.shape must have two dimensions, got {shape}"
    rows, columns = shape
    assert rows % block_n == 0, f"{name}: rows must be a multiple of {block_n}, got {rows}"
    assert columns % 2 == 0, f"{name}: columns must be even, got {columns}"

    quant_state.original_qshape = qweight.shape
    quant_state.original_dtype = quant_state.dtype
    quant_state.original_nested = quant_state.nested
    if qweight.dtype != torch.uint8:
        quant_state.original_storage_type = qweight.dtype
        qweight = qweight.view(torch.uint8)
    pairs = qweight.reshape(rows // block_n, block_n, columns // 2)
    # [groups, column pairs, rows, 2]: the first element of a pair is in the high half.
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).transpose(1, 2)
    low, high = codes.reshape(*codes.shape[:2], 2, block_n).unbind(2)
    packed = (high << 4 | low).reshape(rows, columns // 2)

    absmax = quant_state.absmax
    if quant_state.nested:
        absmax = dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
        quant_state.nested = False
        del quant_state.state2
    absmax = absmax.reshape(rows, columns // quant_state.blocksize)
    quant_state.absmax = absmax.t().contiguous().to(torch.bfloat16)
    quant_state.dtype = torch.bfloat16
    quant_state.packing_format_for_cpu = True
    return packed, quant_state


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """Brings a weight back that :func:`_convert_weight_packed_for_cpu` packed.

    Args:
        packed_weight: uint8 ``[N, K / 2]``.
        quant_state: Its state, which is changed in place. The scales stay rounded to bfloat16;
            where they were nested, they are quantized anew.
        block_n: Rows of a group.

    Returns:
        The codes as they were, bit for bit, and `quant_state`.
    """
    rows, columns = quant_state.shape
    groups = packed_weight.reshape(rows // block_n, columns // 2, block_n)
    codes = torch.cat((groups & 15, groups >> 4), dim=-1)
    codes = codes.reshape(rows // block_n, columns // 2, block_n, 2).transpose(1, 2)
    qweight = (codes[..., 0] << 4 | codes[..., 1]).reshape(-1)
    storage = quant_state.__dict__.pop("original_storage_type", torch.uint8)
    qweight = qweight.view(storage).reshape(quant_state.__dict__.pop("original_qshape"))

    absmax = quant_state.absmax.t().reshape(-1).to(torch.float32)
    quant_state.nested = quant_state.__dict__.pop("original_nested")
    quant_state.state2 = None
    if quant_state.nested:
        quant_state.offset = absmax.mean()
        absmax, quant_state.state2 = quantize_blockwise(
            absmax - quant_state.offset, blocksize=NESTED_BLOCKSIZE
        )
    quant_state.absmax = absmax
    quant_state.dtype = quant_state.__dict__.pop("original_dtype")
    quant_state.packing_format_for_cpu = False
    return qweight, quant_state
