# SPDX-License-Identifier: MIT
"""Training in fewer bits as it was studied: simulated FP8, SwitchBack."""

from . import autograd, nn
from .fp8 import matmul_fp8_global, matmul_fp8_mixed
from .switchback import switchback_bnb

__all__ = ["autograd", "matmul_fp8_global", "matmul_fp8_mixed", "nn", "switchback_bnb"]
