# SPDX-License-Identifier: MIT
"""Old import path of the products in `bitsandbytes.research`."""

from . import _functions

__all__ = ["_functions"]
