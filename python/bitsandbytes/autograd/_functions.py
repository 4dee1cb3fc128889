# SPDX-License-Identifier: MIT
"""Old import path of the names in `bitsandbytes.autograd`."""

from torch import Tensor

from ..quant.state import QuantState
from .matmul import GlobalOutlierPooler, MatmulLtState, matmul
from .matmul4 import matmul_4bit
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


class MatMul4Bit:
    """Compat: :func:`matmul_4bit` as programs call it that go past that function."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        """:func:`matmul_4bit` with its arguments in another order."""
        return matmul_4bit(A, B, quant_state, out, bias)


class MatMul8bitLt:
    """Compat: :func:`matmul` as programs call it that go past that function."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        """:func:`matmul` with its arguments in another order."""
        return matmul(A, B, out, state, bias=bias)
