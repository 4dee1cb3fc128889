# SPDX-License-Identifier: MIT
"""Old import path of the products in `bitsandbytes.research`."""

from ..fp8 import matmul_fp8_global, matmul_fp8_mixed
from ..switchback import switchback_bnb

__all__ = ["matmul_fp8_global", "matmul_fp8_mixed", "switchback_bnb"]
