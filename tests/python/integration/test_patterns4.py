# SPDX-License-Identifier: MIT
"""How inference servers hold 4-bit weights, without the servers."""

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_scales_that_a_loader_has_dequantized(device, storage):
    weight, x = torch.randn(96, 64, device=device), torch.randn(3, 64, device=device)
    packed, state = F.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, quant_storage=storage, blocksize=64
    )
    want = bnb.matmul_4bit(x, packed.t(), state)
    state.absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.nested, state.state2, state.offset = False, None, None
    torch.testing.assert_close(bnb.matmul_4bit(x, packed.t(), state), want)


def test_parts_of_a_weight_with_states_of_their_own(device):
    weight, x = torch.randn(96, 64, device=device), torch.randn(3, 64, device=device)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    want = bnb.matmul_4bit(x, packed, state)
    halves = []
    for half in range(2):
        part = F.QuantState(
            absmax=state.absmax.chunk(2)[half],
            shape=(48, 64),
            code=state.code,
            blocksize=state.blocksize,
            quant_type="nf4",
            dtype=state.dtype,
        )
        halves.append(bnb.matmul_4bit(x, packed.chunk(2)[half].t(), part))
    torch.testing.assert_close(torch.cat(halves, 1), want)


def test_a_weight_moved_by_hand(device):
    weight = bnb.nn.Params4bit(
        torch.randn(96, 64),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
    )
    weight = weight.cuda(device) if device == "cuda" else weight.to(device)
    x, bias = torch.randn(3, 64, device=device), torch.randn(96, device=device)
    out = bnb.matmul_4bit(x, weight.t(), bias=bias, quant_state=weight.quant_state)
    numbers = F.dequantize_4bit(weight, weight.quant_state)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, numbers, bias))
