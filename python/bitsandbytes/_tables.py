# SPDX-License-Identifier: MIT
"""Small tables that are made once for every device and then shared."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

__all__ = ["shared_table"]


def shared_table(cache: dict, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Returns the tensor that `cache` holds for `key`, or the one that `make` gives.

    That one is kept, unless it is the stand-in of a tracer or of FakeTensorMode, which would be of
    no use to others; nor do these take a tensor from the cache. It must not be modified.
    """
    table = cache.get(key)
    compiling = torch.compiler.is_compiling()
    if table is None or (not compiling and _in_fake_mode()):
        # Not as an inference tensor, because training may come later.
        with torch.inference_mode(False):
            table = make()
        if type(table) is Tensor and not compiling:
            cache[key] = table
    return table


def _in_fake_mode() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 and detect_fake_mode() is not None
