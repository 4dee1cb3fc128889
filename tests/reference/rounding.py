# SPDX-License-Identifier: MIT
"""Executable specification of stochastic rounding, in NumPy and without bitsandbytes."""

import numpy as np

__all__ = ["bits", "philox", "round_up"]


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: uint64 [n, 4] of numbers below 2^32.
        seed: The key; its lowest 64 bits count.

    Returns:
        uint32 [n, 4].
    """
    mask, half = np.uint64(2**32 - 1), np.uint64(32)
    c = np.asarray(counter, np.uint64).T
    for round_ in range(10):
        key = [(seed >> 32 * i) + round_ * bump for i, bump in enumerate((0x9E3779B9, 0xBB67AE85))]
        k0, k1 = (np.uint64(k % 2**32) for k in key)
        a = np.uint64(0xD2511F53) * c[0]
        b = np.uint64(0xCD9E8D57) * c[2]
        c = ((b >> half) ^ c[1] ^ k0, b & mask, (a >> half) ^ c[3] ^ k1, a & mask)
    return np.stack(c, axis=1).astype(np.uint32)


def bits(n: int, seed: int, tensor: int, t: int) -> np.ndarray:
    """Returns uint32 [n]: 16 random bits for each element of tensor number `tensor` in step t.

    Eight elements share the four words of one group, the lower half of a word first.
    """
    group = np.arange(-(-n // 8), dtype=np.uint64)
    mask, half = np.uint64(2**32 - 1), np.uint64(32)
    rest = [np.full_like(group, x % 2**32) for x in (tensor, t)]
    words = philox(np.stack((group & mask, group >> half, *rest), axis=1), seed)
    halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=2)
    return halves.reshape(-1)[:n]


def round_up(x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Rounds float32 numbers to bfloat16, away from zero where x + random carries over.

    So that happens with the probability of the part that is cut off. NaN stays NaN.
    """
    x = np.ascontiguousarray(x, np.float32)
    word = (x.view(np.uint32).astype(np.uint64) + random) & np.uint64(0xFFFF0000)
    return np.where(np.isnan(x), x, word.astype(np.uint32).view(np.float32))
