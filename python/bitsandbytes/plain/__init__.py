# SPDX-License-Identifier: MIT
"""Plain-PyTorch implementation of every op: what runs on a device that has no native kernel."""

from . import (
    clipping,
    gemm_4bit,
    grouped_gemm_4bit,
    int8,
    optimizer,
    quantiles,
    quantize,
    quantize_4bit,
    update,
)

__all__ = [
    "clipping",
    "gemm_4bit",
    "grouped_gemm_4bit",
    "int8",
    "optimizer",
    "quantiles",
    "quantize",
    "quantize_4bit",
    "update",
]
