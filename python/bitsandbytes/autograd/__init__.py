# SPDX-License-Identifier: MIT
"""Products with quantized weights that gradients flow through."""

from .matmul import MatmulLtState, matmul

__all__ = ["MatmulLtState", "matmul"]
