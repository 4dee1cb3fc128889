# SPDX-License-Identifier: MIT
"""Products with quantized weights that gradients flow through."""

from .grouped4 import grouped_matmul_4bit
from .matmul import MatmulLtState, matmul
from .matmul4 import matmul_4bit

__all__ = ["MatmulLtState", "grouped_matmul_4bit", "matmul", "matmul_4bit"]
