# SPDX-License-Identifier: MIT
"""Products of groups of rows with a 4-bit weight each, in plain PyTorch.

Weights are dequantized to the dtype of the other operand, one at a time; products are summed in
float32. The host must know where groups end, and waits for a device that does.
"""

import torch
import torch.nn.functional
from torch import Tensor

from .._checks import OFFSETS, check, check_device, check_dtype, check_shape
from .._ops import register_kernel
from .._precision import full_precision
from .gemm_4bit import check_product, product_float32, weight_scales

__all__: list[str] = []


def _check_grouped(
    op: str,
    name: str,
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    shape: list[int],
    blocksize: int,
    transposed: bool = False,
) -> int:
    """Checks the operands; returns the number of blocks of the weight."""
    check(A.dim() == 2, op, name, "2-D", f"shape {list(A.shape)}")
    blocks = check_product(op, name, A, B, shape, blocksize, transposed, grouped=True)
    check_dtype(op, "offs", offs, *OFFSETS)
    check_shape(op, "offs", offs, shape[:1])
    check_device(op, "offs", offs, name, A)
    return blocks


def _ends(op: str, offs: Tensor, rows: int) -> list[int]:
    """Returns where groups end, as numbers: on a GPU the host waits for them."""
    ends = offs.tolist()
    ascending = all(a <= b for a, b in zip([0, *ends], [*ends, rows], strict=True))
    check(ascending, op, "offs", f"ascending from 0 to at most {rows}", ends)
    return ends


def _weight(
    B: Tensor,
    scales: Tensor,
    shape: list[int],
    blocksize: int,
    quant_type: str,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantizes the weight of one group, wherever its codes begin."""
    size = shape[1] * shape[2]
    first, end = group * size, (group + 1) * size
    begin = first // blocksize * blocksize
    packed = B.reshape(-1).view(torch.uint8)[begin // 2 : (end + 1) // 2]
    scales = scales[begin // blocksize : -(-end // blocksize)]
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    values = dequantize(packed, scales, blocksize, quant_type, [end - begin], dtype)
    return values[first - begin :].view(shape[1:])


@register_kernel("_grouped_gemm_4bit_plain", "default")
@register_kernel("grouped_gemm_4bit", "default")
@torch.no_grad()
def grouped_gemm_4bit(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "grouped_gemm_4bit"
    blocks = _check_grouped(op, "A", A, B, offs, shapeB, blocksize)
    quantized = (absmax, absmax_8bit, absmax_code, absmax_offset)
    scales = weight_scales(op, B, blocks, quant_type, *quantized)
    if bias is not None:
        check_dtype(op, "bias", bias, A.dtype)
        check_device(op, "bias", bias, "A", A)
        check_shape(op, "bias", bias, shapeB[:2])
    out = A.new_zeros(A.shape[0], shapeB[1])
    first = 0
    with full_precision(A.device):
        for group, end in enumerate(_ends(op, offs, A.shape[0])):
            if end > first:
                weight = _weight(B, scales, shapeB, blocksize, quant_type, group, A.dtype)
                shift = None if bias is None else bias[group]
                out[first:end] = torch.nn.functional.linear(A[first:end], weight, shift)
            first = end
    return out


@register_kernel("_grouped_gemm_4bit_dgrad_plain", "default")
@register_kernel("grouped_gemm_4bit_dgrad", "default")
@torch.no_grad()
def grouped_gemm_4bit_dgrad(
    grad: Tensor,
    B: Tensor,
    offs: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    op = "grouped_gemm_4bit_dgrad"
    blocks = _check_grouped(op, "grad", grad, B, offs, shapeB, blocksize, transposed=True)
    quantized = (absmax, absmax_8bit, absmax_code, absmax_offset)
    scales = weight_scales(op, B, blocks, quant_type, *quantized)
    out = grad.new_zeros(grad.shape[0], shapeB[2])
    first = 0
    with full_precision(grad.device):
        for group, end in enumerate(_ends(op, offs, grad.shape[0])):
            if end > first:
                weight = _weight(B, scales, shapeB, blocksize, quant_type, group, grad.dtype)
                out[first:end] = product_float32(grad[first:end], weight)
            first = end
    return out
