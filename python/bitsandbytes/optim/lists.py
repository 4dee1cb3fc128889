# SPDX-License-Identifier: MIT
"""What a step does with whole lists of Python objects, natively where that is possible."""

import itertools
import operator

import torch
from torch import Tensor

from .. import _library

__all__ = ["all_are", "gradients", "holds_none"]

try:
    _module = _library.native_module()
except ImportError:  # `python -m bitsandbytes` says why
    _module = None


def _is_native() -> bool:
    # What is not Python cannot be traced.
    return _module is not None and not torch.compiler.is_compiling()


def gradients(params: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradient of each parameter."""
    if _is_native():
        return _module.gradients(params)
    return [p.grad for p in params]


def all_are(a: list, b: list) -> bool:
    """Whether two lists hold the same objects."""
    if _is_native():
        return _module.all_are(a, b)
    return len(a) == len(b) and all(map(operator.is_, a, b))


def holds_none(objects: list) -> bool:
    """Whether one of them is None."""
    if _is_native():
        return _module.holds_none(objects)
    return any(map(operator.is_, objects, itertools.repeat(None)))
