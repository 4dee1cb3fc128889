# SPDX-License-Identifier: MIT
"""Stochastic rounding in plain PyTorch, with the bits that native kernels take."""

import torch
from torch import Tensor

__all__ = ["philox", "round_stochastic", "rounding_bits"]

_MASK = 0xFFFFFFFF
_GROUP = 8  # elements that share one call of the generator, 16 bits each


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Returns the upper and the lower 32 bits of a product of 32-bit numbers held as int64."""
    low = a * (factor & 0xFFFF)
    high = a * (factor >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011).

    Args:
        counter: Four words: int64 ``[n]`` of numbers below 2^32.
        seed: The key; its lowest 64 bits count.

    Returns:
        int64 ``[n, 4]`` of numbers below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        a_high, a_low = _multiply(c0, 0xD2511F53)
        b_high, b_low = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def rounding_bits(n: int, seed: int, tensor: int, step: int, device: torch.device) -> Tensor:
    """Returns int32 ``[n]``: 16 random bits per element of a list's tensor in one step."""
    group = torch.arange(-(-n // _GROUP), device=device)
    counter = (
        group & _MASK,
        group >> 32,
        torch.full_like(group, tensor & _MASK),
        torch.full_like(group, step & _MASK),
    )
    words = philox(counter, seed)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2)
    return halves.reshape(-1)[:n].to(torch.int32)


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """Rounds float32 ``[n]`` to numbers of bfloat16, up with the probability of what is cut off.

    Args:
        x: float32 ``[n]``.
        bits: int32 ``[n]``: 16 random bits each.

    Returns:
        float32 ``[n]``, exact in bfloat16.
    """
    cut = ((x.view(torch.int32) + bits) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isnan(), x, cut)
