# SPDX-License-Identifier: MIT
"""How inference servers hold int8 weights, without the servers."""

import warnings

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params


def quantized(device):
    weight = Int8Params(torch.randn(96, 64), requires_grad=False, has_fp16_weights=False)
    return weight.cuda(device) if device == "cuda" else weight.to(device)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_states_that_a_loader_fills(device, threshold):
    weight = quantized(device)
    values = int8_vectorwise_dequant(weight.CB, weight.SCB)
    x = torch.randn(2, 3, 64, device=device)
    outs = []
    # A whole weight, and one that was sharded: codes and statistics of some rows each.
    for rows in ((slice(0, 96),), (slice(0, 40), slice(40, 96))):
        parts = []
        for part in rows:
            codes = Int8Params(data=weight.data[part], has_fp16_weights=False, requires_grad=False)
            state = bnb.MatmulLtState()
            state.CB, state.SCB = codes.data, weight.SCB[part]
            state.threshold, state.has_fp16_weights, state.is_training = threshold, False, False
            if threshold > 0.0:
                state.use_pool = True
            parts.append(bnb.matmul(x, codes, state=state))
            assert state.CB is not None and (state.idx is None) == (threshold == 0)
        outs.append(torch.cat(parts, -1))
    assert torch.equal(*outs)
    exact = x @ values.t()
    assert (outs[0] - exact).norm() < 0.02 * exact.norm()


def test_a_layer_made_of_parameter_and_state(device):
    """As text-generation-inference does: attributes of several releases, read and set."""
    weight = quantized(device)
    state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights, state.memory_efficient_backward = 6.0, False, False
    state.use_pool = True
    state.CB, state.SCB = weight.CB, weight.SCB
    weight.CB = weight.SCB = None
    state.is_training = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for _ in "12":
            out = bnb.matmul(torch.randn(3, 64, device=device), weight, bias=None, state=state)
            assert out.shape == (3, 96)
            if not state.has_fp16_weights and state.CB is not None and state.CxB is not None:
                del state.CB
                weight.data = state.CxB
