# SPDX-License-Identifier: MIT
"""Old import path of the names in `bitsandbytes.autograd`."""

from .matmul import GlobalOutlierPooler, MatMul8bitLt, MatmulLtState, matmul
from .matmul4 import MatMul4Bit, matmul_4bit
from .matmul8 import MatMul8bit, bmm_cublas, matmul_cublas, mm_cublas

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bit",
    "MatMul8bitLt",
    "MatmulLtState",
    "bmm_cublas",
    "matmul",
    "matmul_4bit",
    "matmul_cublas",
    "mm_cublas",
]
