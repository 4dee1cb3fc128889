# SPDX-License-Identifier: MIT
"""Double quantization: scales that are 8-bit codes themselves (arXiv:2305.14314, section 3)."""

import torch
from torch import Tensor

from .codes import default_code
from .state import QuantState

__all__ = ["nested_arguments", "quantize_scales"]


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
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(scales - offset, code, blocksize)
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


def nested_arguments(state: QuantState, device: torch.device) -> tuple:
    """Returns what the ops on quantized scales take for those of `state`.

    Returns:
        uint8 codes, their code, their float32 scales and offset; the blocksize of the codes.
    """
    second = state.state2
    levels = second.levels()
    code = default_code("dynamic", device) if levels is None else levels.to(device)
    offset = torch.as_tensor(state.offset, dtype=torch.float32, device=device)
    return (
        state.absmax.to(torch.uint8),
        code,
        second.absmax.to(torch.float32),
        offset,
        second.blocksize,
    )
