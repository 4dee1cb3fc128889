# SPDX-License-Identifier: MIT
"""What keeps the operands of a product in the precision that they were given in."""

from contextlib import AbstractContextManager, nullcontext

import torch

from ._checks import AUTOCAST_DEVICES

__all__ = ["full_precision"]


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Keeps an enclosing autocast from rounding the operands of a float32 product to 16 bits."""
    if device.type in AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
