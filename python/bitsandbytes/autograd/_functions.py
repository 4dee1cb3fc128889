# SPDX-License-Identifier: MIT
"""Old import path of the names in `bitsandbytes.autograd.matmul`."""

from .matmul import GlobalOutlierPooler, MatMul8bitLt, MatmulLtState, matmul

__all__ = ["GlobalOutlierPooler", "MatMul8bitLt", "MatmulLtState", "matmul"]
