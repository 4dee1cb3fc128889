# SPDX-License-Identifier: MIT
"""Weights of products with 4-bit codes, and how close to their specification results must be."""

import numpy as np
import torch
from quant_inputs import name_of, numpy

import bitsandbytes.functional as F
from reference import gemm4 as reference

__all__ = ["assert_close_sums", "assert_product", "make_weight"]


def make_weight(shape, blocksize, quant_type, nested=False, dtype=torch.float32, device="cpu"):
    """Packed codes, the state, and the weight in float64 for activations of `dtype`."""
    values = torch.randn(shape).to(device)
    packed, state = F.quantize_4bit(
        values, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    scales = numpy(state.absmax)
    if nested:
        inner = state.state2
        scales = reference.nested_scales(
            scales, numpy(inner.code), numpy(inner.absmax), numpy(state.offset)
        )
    codes = numpy(packed)
    weight = reference.weight(quant_type, codes, scales, blocksize, shape, name_of(dtype))
    return packed, state, weight


def assert_product(result, a, b, bias=None, loose=False, by_torch=False):
    """That a result of float32 sums, rounded once, is the product of two matrices.

    With `loose`, of one of them somewhat off, as what a kernel of a GPU makes of the weight is.
    `by_torch`: torch made the sums on a GPU, and may have rounded them before it added the bias.
    """
    bias = None if bias is None else numpy(bias)
    dtype = name_of(result.dtype)
    want, size = reference.product(a, b, bias)
    rounding = reference.weight_rounding(a, b, dtype) if loose else 0.0
    if by_torch:
        rounding += reference.sum_rounding(size, dtype)
    assert_close_sums(result, want, size, b.shape[0], rounding)


def assert_close_sums(result, want, size, terms, rounding=0.0):
    """That a result is `want`, sums of `terms` with magnitudes `size` made in float32.

    `rounding`: how far it may be off for another reason.
    """
    got = numpy(result).reshape(want.shape)
    bound = reference.closeness(want, size, terms, name_of(result.dtype)) + rounding
    assert (np.abs(got - want) <= bound).all(), np.abs((got - want) / bound).max()
