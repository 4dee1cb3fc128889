# SPDX-License-Identifier: MIT
"""Double quantization: scales that are 8-bit codes themselves (arXiv:2305.14314, section 3)."""

import torch
from torch import Tensor

from .codes import default_code
from .state import QuantState

__all__ = ["nested_arguments", "plain_scales", "quantize_scales", "weight_arguments"]

# Scales that share a scale of their own, where an op does not name the number.
NESTED_BLOCKSIZE = 256


def quantize_scales(scales: Tensor, blocksize: int) -> tuple[Tensor, Tensor, QuantState]:
    """Quantizes the scales of a tensor, less their mean, with the signed dynamic map.

    Args:
        scales: float32 ``[blocks]``.
        blocksize: Scales per block.

    Returns:
        uint8 codes ``[blocks]``, the 0-dim float32 mean, and the state of the codes.
    """
    offset = _mean(scales)
    code = default_code("dynamic", scales.device)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(
        scales - offset, code, blocksize
    )
    state = QuantState(absmax, blocksize=blocksize, dtype=torch.float32)
    state.share_code(code)
    return codes, offset, state


def _mean(scales: Tensor) -> Tensor:
    """Returns the float32 mean of float32 numbers; 0 of none.

    Sums of float64 are exact unless the numbers are of very different size, so that their order,
    which differs between devices, does not matter.
    """
    wide = torch.float32 if scales.device.type == "mps" else torch.float64
    return (scales.sum(dtype=wide) / max(scales.numel(), 1)).to(torch.float32)


def plain_scales(state: QuantState) -> Tensor:
    """Returns the scales of a state that is not nested, in float32."""
    absmax = state.absmax
    # Comparing is ten times as fast as a conversion that has nothing to do.
    return absmax if absmax.dtype == torch.float32 else absmax.to(torch.float32)


def nested_arguments(state: QuantState, device: torch.device) -> tuple:
    """Returns what the ops on quantized scales take for those of `state`.

    Returns:
        uint8 codes, their code, their float32 scales and offset; the blocksize of the codes.
    """
    codes, second, offset = state.absmax, state.state2, state.offset
    code, absmax = second.levels(), second.absmax
    if codes.dtype != torch.uint8:
        codes = codes.to(torch.uint8)
    if absmax.dtype != torch.float32:
        absmax = absmax.to(torch.float32)
    if code is None or code.device != device:
        code = default_code("dynamic", device) if code is None else code.to(device)
    if not isinstance(offset, Tensor) or offset.device != device or offset.dtype != torch.float32:
        offset = torch.as_tensor(offset, dtype=torch.float32, device=device)
    return codes, code, absmax, offset, second.blocksize


def weight_arguments(state: QuantState, device: torch.device) -> tuple[tuple, tuple]:
    """Returns what the products with a 4-bit weight take for its state.

    Returns:
        Shape, scales, blocksize and type; then codes, code and offset of the scales, or nothing
        where the scales are numbers. `gemm_4bit` takes its bias between the two.
    """
    nested = ()
    if not state.nested:
        absmax = plain_scales(state)
    else:
        codes, code, absmax, offset, blocksize = nested_arguments(state, device)
        if blocksize == NESTED_BLOCKSIZE:
            nested = (codes if codes.dim() == 1 else codes.flatten(), code, offset)
        else:
            decode = torch.ops.bitsandbytes.dequantize_blockwise.default
            absmax = decode(codes, absmax, code, blocksize, torch.float32) + offset
    # Ops take a plain tuple faster than its subclass.
    return (tuple(state.shape), absmax, state.blocksize, state.quant_type), nested
