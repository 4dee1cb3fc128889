# SPDX-License-Identifier: MIT
"""Products with quantized weights that gradients flow through."""

from .matmul import MatmulLtState, matmul
from .matmul4 import matmul_4bit

__all__ = ["MatmulLtState", "matmul", "matmul_4bit"]
