# SPDX-License-Identifier: MIT
"""Argument checks of the plain ops: an error names the op, the argument, what it must be and is."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "AUTOCAST_DEVICES",
    "FLOATS",
    "OFFSETS",
    "check",
    "check_device",
    "check_dtype",
    "check_numel",
    "check_output",
    "check_shape",
    "check_written",
    "warn_user",
]

_PACKAGE = str(Path(__file__).parent)

# Device types that have autocast. Asked once: torch.compile cannot trace the question in every
# version of torch.
AUTOCAST_DEVICES = frozenset(
    name
    for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")
    if torch.amp.is_autocast_available(name)
)

# What activations, weights, biases and results may be.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# What the ends of groups of rows may be.
OFFSETS = (torch.int32, torch.int64)


def check(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raises ValueError with the one sentence of this package unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def check_dtype(op: str, argument: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raises ValueError unless `tensor` has one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        check(False, op, argument, names, tensor.dtype)


def check_shape(op: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError unless `tensor` has exactly this shape."""
    if tuple(tensor.shape) != tuple(shape):
        check(False, op, argument, f"of shape {list(shape)}", f"shape {list(tensor.shape)}")


def check_numel(op: str, argument: str, tensor: Tensor, numel: int, of_what: str) -> None:
    """Raises ValueError unless `tensor` holds one element per row or column of something."""
    if tensor.numel() != numel:
        expected = f"of {numel} elements ({of_what})"
        check(False, op, argument, expected, f"shape {list(tensor.shape)}")


def check_device(op: str, argument: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    """Raises ValueError unless `tensor` is where `reference` (the argument `other`) is."""
    if tensor.device != reference.device:
        expected = f"on the device of {other} ({reference.device})"
        check(False, op, argument, expected, tensor.device)


def check_written(op: str, argument: str, tensor: Tensor) -> None:
    """Raises ValueError if elements of a tensor that is to be written are one in memory."""
    if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        shape = f"an expanded tensor of shape {list(tensor.shape)}"
        check(False, op, argument, "with memory for each element", shape)


def check_output(
    op: str,
    argument: str,
    out: Tensor | None,
    size: Sequence[int] | int,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises ValueError unless `out`, where it is given, can take a result.

    Args:
        op: Function that the result is of.
        argument: Name of `out` there.
        out: Tensor of the caller's.
        size: Shape of the result, or how many elements it has where `out` may have any shape.
        dtype: dtype of the result; None where it is converted to that of `out`.
    """
    if out is None:
        return
    by_shape = not isinstance(size, int)
    fits = tuple(out.shape) == tuple(size) if by_shape else out.numel() == size
    if not fits or (dtype is not None and out.dtype != dtype):
        expected = f"of shape {list(size)}" if by_shape else f"of {size} elements"
        got = f"shape {list(out.shape)}"
        if dtype is not None:
            expected, got = f"{dtype} {expected}", f"{out.dtype} of {got}"
        check(False, op, argument, expected, got)
    check_written(op, argument, out)


def warn_user(message: str) -> None:
    """Warns with the place of the caller's code that entered this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
