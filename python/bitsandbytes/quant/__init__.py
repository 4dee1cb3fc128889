# SPDX-License-Identifier: MIT
"""Quantization functions and their state; `bitsandbytes.functional` re-exports the public names."""
