# SPDX-License-Identifier: MIT
"""Old import path of the names in `bitsandbytes.autograd.matmul` and `.matmul4`."""

from .matmul import GlobalOutlierPooler, MatMul8bitLt, MatmulLtState, matmul
from .matmul4 import MatMul4Bit, matmul_4bit

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]
