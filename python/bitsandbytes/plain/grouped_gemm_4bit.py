# SPDX-License-Identifier: MIT
"""Products of groups of rows with a 4-bit weight each, in plain PyTorch.

Weights are dequantized to the dtype of the other operand; products are summed in float32. Where
torch has a grouped product, it takes all of them at once. Elsewhere they are dequantized one at a
time; then the host must know where groups end, and waits for a device that does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional
from torch import Tensor

from .._checks import OFFSETS, check, check_device, check_dtype, check_shape
from .._ops import register_kernel
from .._precision import full_precision
from .gemm_4bit import check_product, product_float32, weight_scales

__all__ = ["bias_of_rows", "group_of_rows"]


def group_of_rows(offs: Tensor, rows: int) -> Tensor:
    """Returns the group of each row, int64; ``offs.numel()`` for rows of none."""
    numbers = torch.arange(rows, device=offs.device, dtype=offs.dtype)
    return torch.searchsorted(offs, numbers, right=True)


def bias_of_rows(bias: Tensor, offs: Tensor, rows: int) -> Tensor:
    """Returns the line of the bias ``[E, N]`` for each row; zeros for rows of no group."""
    return torch.nn.functional.pad(bias, (0, 0, 0, 1))[group_of_rows(offs, rows)]


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


def _by_group(
    op: str, A: Tensor, offs: Tensor, columns: int, product: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Returns ``product(rows, group)`` of the rows of each group, and zeros for rows of none."""
    out = A.new_zeros(A.shape[0], columns)
    first = 0
    with full_precision(A.device):
        for group, end in enumerate(_ends(op, offs, A.shape[0])):
            if end > first:
                out[first:end] = product(A[first:end], group)
            first = end
    return out


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


def _torch_takes(A: Tensor, shape: list[int]) -> bool:
    """Whether torch's grouped product for GPUs takes rows and weights: lines of 16 bytes."""
    return (
        A.device.type == "cuda"
        and torch.version.hip is None
        and A.dtype == torch.bfloat16
        and A.shape[0] > 0
        and all(size > 0 and size % 8 == 0 for size in shape[1:])
        and torch.cuda.get_device_capability(A.device) >= (8, 0)
    )


def _grouped_mm(A: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """Returns torch's product with weights ``[E, K, N]``, and zeros for rows of no group."""
    out = torch.nn.functional.grouped_mm(A.contiguous(), weights, offs=offs.to(torch.int32))
    of_none = torch.arange(A.shape[0], device=A.device) >= offs[-1]
    return out.masked_fill_(of_none.unsqueeze(1), 0)


def _weights(
    B: Tensor, scales: Tensor, shape: list[int], blocksize: int, quant_type: str, dtype: torch.dtype
) -> Tensor:
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    return dequantize(B, scales, blocksize, quant_type, shape, dtype)


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
    if _torch_takes(A, shapeB) and shapeB[0]:
        weights = _weights(B, scales, shapeB, blocksize, quant_type, A.dtype)
        out = _grouped_mm(A, weights.transpose(1, 2), offs)
        if bias is None:
            return out
        return out + bias_of_rows(bias, offs, A.shape[0])

    def product(rows: Tensor, group: int) -> Tensor:
        weight = _weight(B, scales, shapeB, blocksize, quant_type, group, A.dtype)
        shift = None if bias is None else bias[group]
        return torch.nn.functional.linear(rows, weight, shift)

    return _by_group(op, A, offs, shapeB[1], product)


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
    if _torch_takes(grad, shapeB) and shapeB[0]:
        weights = _weights(B, scales, shapeB, blocksize, quant_type, grad.dtype)
        return _grouped_mm(grad, weights, offs)

    def product(rows: Tensor, group: int) -> Tensor:
        weight = _weight(B, scales, shapeB, blocksize, quant_type, group, grad.dtype)
        return product_float32(rows, weight)

    return _by_group(op, grad, offs, shapeB[2], product)
