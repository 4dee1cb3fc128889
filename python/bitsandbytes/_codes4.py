# SPDX-License-Identifier: MIT
"""Levels and thresholds of the 4-bit codes: 16 float32 values by code.

`nf4` and `fp4` are quantized with; `af4` (abnormal floats, arXiv:2306.06965) and `int4` are tables
for lookup only. The numbers of `nf4` and `fp4` are those of ``include/bitsandbytes/code``.
"""

import torch
from torch import Tensor

from ._tables import new_table, usable

__all__ = ["BLOCKSIZES", "LEVELS", "QUANT_TYPES", "STORAGES", "levels", "thresholds"]

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("fp4", "nf4")

# What packed codes may be stored as: their bytes are the same in each.
STORAGES = (
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.int16,
    torch.uint16,
    torch.float32,
    torch.int32,
    torch.uint32,
    torch.float64,
    torch.int64,
    torch.uint64,
)

_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": (*(x / 12 for x in _TWELFTHS), *(-x / 12 for x in _TWELFTHS)),
    "af4": (
        1.0,
        0.72424863,
        0.55496234,
        0.42563882,
        0.31675666,
        0.21961274,
        0.12934483,
        0.04273164,
        0.0,
        -0.04934812,
        -0.14982478,
        -0.25607552,
        -0.3736951,
        -0.51243739,
        -0.69441008,
        -1.0,
    ),
    "int4": (*(x / 7 for x in range(7, -1, -1)), *(-x / 7 for x in range(8))),
}

# Of |s|; not the midpoints of the levels to the last bit, but those of public checkpoints.
_FP4_THRESHOLDS = (
    0.00260417,
    0.0859375,
    0.20833333,
    0.29166667,
    0.4166667,
    0.583333,
    0.8333333,
)

_cache: dict[tuple[str, torch.device, bool], Tensor] = {}


def levels(name: str, device: torch.device, negative_zero: bool = True) -> Tensor:
    """Returns the shared copy of a code's float32 levels ``[16]``. It must not be modified.

    Args:
        name: A key of `LEVELS`.
        device: Where the table is needed; each device gets its copy once.
        negative_zero: Whether a level of zero keeps its sign, which the codes of `fp4` have.
    """
    key = (name, device, negative_zero)
    table = _cache.get(key)
    if usable(table):
        return table

    def make() -> Tensor:
        numbers = LEVELS[name] if negative_zero else [x + 0.0 for x in LEVELS[name]]
        table = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        # The copy of so small a table is staged before the call returns: nothing waits for it.
        return table.to(device, non_blocking=True)

    return new_table(_cache, key, make)


def thresholds(name: str, device: torch.device) -> Tensor:
    """Returns the decision thresholds of ``nf4`` (of s) or ``fp4`` (of ``|s|``), ascending."""
    if name == "fp4":
        return torch.tensor(_FP4_THRESHOLDS, dtype=torch.float32, device=device)
    table = levels(name, device)
    return (table[:-1] + table[1:]) * 0.5
