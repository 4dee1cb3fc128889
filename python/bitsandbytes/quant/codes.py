# SPDX-License-Identifier: MIT
"""Tables of quantization levels ("codes"): 256 float32 values in ascending order.

The tables are bit-exact on every machine: they are computed in float64 and rounded to float32 once
where the public format rounds, instead of through `torch.linspace`, whose last bit depends on the
processor.
"""

import itertools
import statistics
import struct

import torch
from torch import Tensor

from .._checks import check
from .._tables import new_table, usable

__all__ = [
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "default_code",
    "name2qmap",
]

LEVELS = 256


def _round32(x: float) -> float:
    """Rounds a Python float to the nearest float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def _linspace32(start: float, end: float, count: int) -> list[float]:
    """Equally spaced float32 points as `torch.linspace` gives them with fused multiply-add.

    The first half counts up from `start`, the second down from `end`; each point is rounded once.
    """
    start, end = _round32(start), _round32(end)
    if count == 1:
        return [start]
    step = _round32(_round32(end - start) / (count - 1))
    return [
        _round32(start + step * k) if k < count // 2 else _round32(end - step * (count - 1 - k))
        for k in range(count)
    ]


def _midpoints(cells: int, scale: float) -> list[float]:
    """Midpoints of `cells` equal cells of [0.1, 1], times `scale`."""
    edges = _linspace32(0.1, 1.0, cells + 1)
    scale = _round32(scale)
    return [
        _round32(_round32(_round32(low + high) / 2.0) * scale)
        for low, high in itertools.pairwise(edges)
    ]


def _check_bits(name: str, total_bits: int) -> None:
    assert 1 <= total_bits <= 8, f"{name}: total_bits must be 1 to 8, got {total_bits}"


def create_dynamic_map(
    signed: bool = True,
    max_exponent_bits: int = 7,
    total_bits: int = 8,
    *,
    n: int | None = None,
) -> Tensor:
    """Creates the dynamic quantization map: decades of equally spaced levels.

    The format spends its leading bits on the decade and the rest on the position inside it, so
    that small and large values have similar relative precision (Dettmers 2015, arXiv:1511.04561).

    Args:
        signed: Levels in [-1, 1] instead of [0, 1].
        max_exponent_bits: Number of decades, of which at most `total_bits` have levels.
        total_bits: Bits of a code; fewer than 8 pad the table with zeros to 256 entries.
        n: Name of `max_exponent_bits` in bitsandbytes 0.0.24.

    Returns:
        float32 tensor of 256 levels, ascending, on the CPU.

    Raises:
        AssertionError: The combination does not give exactly ``2 ** total_bits`` levels.

    Example:
        >>> create_dynamic_map()[[0, 127, 128, 255]]
        tensor([-9.9297e-01,  0.0000e+00,  5.5000e-07,  1.0000e+00])
    """
    _check_bits("create_dynamic_map", total_bits)
    legacy = n is not None
    exponents = n if n is not None else max_exponent_bits
    fraction_bits = total_bits - 1
    levels: list[float] = []
    for i in range(max(exponents - total_bits, 0), exponents):
        power = i + fraction_bits - exponents + (0 if signed else 1)
        cells = 2**power if power >= 0 else 0
        if cells:
            levels += _midpoints(cells, 10.0 ** (i - exponents + 1))
    extra = 2 ** max(fraction_bits - exponents, 0) - 1
    if extra > 0:
        # bitsandbytes 0.0.24 filled the unsigned map to 256 entries; today's assert below.
        count = 2 * extra if legacy and not signed else extra
        levels += _midpoints(count, 1.0)
    if signed:
        levels += [-x for x in levels]
    levels += [0.0, 1.0]
    assert len(levels) == 2**total_bits, (
        f"create_dynamic_map: signed={signed}, max_exponent_bits={exponents}, "
        f"total_bits={total_bits} gives {len(levels)} levels, expected {2**total_bits}"
    )
    levels += [0.0] * (LEVELS - len(levels))
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Creates a map of equally spaced levels from -1 (or 0) to 1.

    Args:
        signed: Levels in [-1, 1] instead of [0, 1].
        total_bits: Bits of a code; fewer than 8 pad the table with zeros in its middle.
        add_zero: A signed 8-bit map gives up one level so that zero is one of them.

    Returns:
        float32 tensor of 256 levels on the CPU.

    Raises:
        AssertionError: `total_bits` is not 1 to 8.

    Example:
        >>> create_linear_map()[[0, 127, 255]]
        tensor([-1.,  0.,  1.])
    """
    _check_bits("create_linear_map", total_bits)
    count = 2**total_bits
    if signed and (add_zero or total_bits < 8):
        count -= 1
    levels = _linspace32(-1.0 if signed else 0.0, 1.0, count)
    middle = count // 2
    padding = [0.0] * (LEVELS - count)
    return torch.tensor(
        levels[:middle] + padding + levels[middle:], dtype=torch.float32, device="cpu"
    )


def _table(levels: list[float]) -> Tensor:
    """Returns the levels, padded with zeros to 256, in ascending order and divided by the last."""
    levels = sorted(levels + [0.0] * (LEVELS - len(levels)))
    return torch.tensor([x / levels[-1] for x in levels], dtype=torch.float32, device="cpu")


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> Tensor:
    """Creates the map of a small floating-point format, scaled to the largest of its numbers.

    Args:
        signed: The format has a sign bit.
        exponent_bits: Bits of the exponent, whose bias is ``2 ** (exponent_bits - 1)``; exponent 0
            is for subnormal numbers.
        precision_bits: Bits of the fraction.
        total_bits: All bits; fewer than 8 pad the table with zeros.

    Returns:
        float32 tensor of 256 levels in [-1, 1] or [0, 1], ascending, on the CPU. A signed map holds
        zero twice.

    Raises:
        AssertionError: The parts do not make `total_bits`.

    Example:
        >>> create_fp8_map()[[0, 1, 255]]
        tensor([-1.0000, -0.8571,  1.0000])
    """
    _check_bits("create_fp8_map", total_bits)
    assert min(exponent_bits, precision_bits) >= 0 < exponent_bits + precision_bits, (
        "create_fp8_map: exponent_bits and precision_bits must be 0 or more and not both 0, "
        f"got {exponent_bits} and {precision_bits}"
    )
    assert exponent_bits + precision_bits + signed == total_bits, (
        f"create_fp8_map: exponent_bits + precision_bits must be {total_bits - signed} "
        f"(total_bits={total_bits}, signed={signed}), got {exponent_bits} + {precision_bits}"
    )
    bias = 2 ** (exponent_bits - 1)
    steps = 2**precision_bits
    levels: list[float] = []
    for exponent in range(2**exponent_bits):
        for i in range(steps):
            # The public format counts exponents downwards from here, so that 1 is the largest.
            scale = 2.0**-bias if exponent == 0 else 2.0 ** (bias + 1 - exponent)
            level = (i / steps + (exponent > 0)) * scale
            levels += [level, -level] if signed else [level]
    return _table(levels)


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Creates the 16 levels of NormalFloat as a table of 256: quantiles of the normal distribution.

    Each level stands for as many normally distributed numbers as any other (Dettmers et al. 2023,
    arXiv:2305.14314, section 3).

    Args:
        offset: Probability of the highest level before scaling; the last is at 0.5.
        use_extra_value: Eight positive levels instead of seven, so 16 with zero; otherwise the map
            is symmetric.

    Returns:
        float32 tensor of 256 levels in [-1, 1], ascending, on the CPU: seven negative levels,
        zeros, and the positive ones.

    Raises:
        ValueError: `offset` is not above 0.5 and below 1.

    Example:
        >>> create_normal_map()[[0, 1, 7, 255]]
        tensor([-1.0000, -0.6962,  0.0000,  1.0000])
    """
    check(0.5 < offset < 1, "create_normal_map", "offset", "above 0.5 and below 1", offset)
    inverse_cdf = statistics.NormalDist().inv_cdf

    def quantiles(count: int) -> list[float]:
        points = _linspace32(offset, 0.5, count + 1)[:-1]
        return [_round32(inverse_cdf(p)) for p in points]

    positive = quantiles(8 if use_extra_value else 7)
    return _table(positive + [-x for x in quantiles(7)])


# The default codes by name, created on first use; kept for code that looks here.
name2qmap: dict[str, Tensor] = {}
_on_device: dict[tuple[str, torch.device], Tensor] = {}


def default_code(name: str, device: torch.device) -> Tensor:
    """Returns the shared copy of a default code on `device`. It must not be modified.

    Args:
        name: ``"dynamic"`` (signed) or ``"udynamic"`` (unsigned).
        device: Where the table is needed; each device gets its copy once.
    """
    key = (name, device)
    code = _on_device.get(key)
    if usable(code):
        return code

    def make() -> Tensor:
        code = name2qmap.get(name)
        if not usable(code):
            code = new_table(name2qmap, name, lambda: create_dynamic_map(name == "dynamic"), True)
        return code.to(device, copy=True)

    return new_table(_on_device, key, make, traced=True)
