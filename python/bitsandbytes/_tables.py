# SPDX-License-Identifier: MIT
"""Small tables that are made once for every device and then shared."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

__all__ = ["new_table", "usable"]


def usable(table: Tensor | None) -> bool:
    """Whether a table that was looked up is there and may be used: not among fake tensors."""
    if table is None:
        return False
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return True
    return detect_fake_mode() is None


def new_table(
    cache: dict, key: Hashable, make: Callable[[], Tensor], traced: bool = False
) -> Tensor:
    """Returns the table that `make` gives, which `cache` keeps. It must not be modified.

    Stand-ins of tracers and of FakeTensorMode are not kept: they would be of no use to others.
    `traced`: what torch.compile makes of a call is kept all the same, once it has run.
    """
    # Not as an inference tensor, because training may come later.
    with torch.inference_mode(False):
        table = make()
    if type(table) is Tensor and (traced or not torch.compiler.is_compiling()):
        cache[key] = table
    return table
