# SPDX-License-Identifier: MIT
"""The int8 embedding: rows are dequantized when they are looked up; saved, loaded and moved."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Embedding8bit, Int8Params


def test_signature():
    names = ["num_embeddings", "embedding_dim", "device", "dtype"]
    assert list(inspect.signature(Embedding8bit).parameters) == names
    assert issubclass(Embedding8bit, nn.Embedding) and bnb.nn.modules.Embedding8bit is Embedding8bit
    layer = Embedding8bit(10, 4, dtype=torch.bfloat16)
    assert layer.dtype == layer.weight.dtype == torch.bfloat16
    assert type(layer.weight) is Int8Params and not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_those_of_the_table(device, dtype):
    layer = Embedding8bit(37, 50, dtype=dtype)
    table = layer.weight.data.clone()
    layer.to(device)
    assert layer.weight.dtype == torch.int8
    values = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).to(dtype)
    assert (values.cpu() - table).abs().max() < 0.05
    for index in (
        torch.tensor([[36, 0, 1], [17, 17, 35]]),
        torch.arange(37, dtype=torch.int32),
        torch.tensor(36),
        torch.empty(2, 0, dtype=torch.long),
    ):
        out = layer(index.to(device))
        assert out.dtype == dtype and out.shape == (*index.shape, 50)
        assert torch.equal(out, values[index.to(device).long()]) and not out.requires_grad


def test_signs_are_kept_exactly(device):
    layer = Embedding8bit(30, 16)
    signs = torch.randint(0, 2, (30, 16)).float() * 2 - 1
    layer.load_state_dict({"weight": signs})
    assert torch.equal(layer.to(device)(torch.arange(30, device=device)).cpu(), signs)


def test_an_unquantized_embedding_says_what_to_do():
    layer = Embedding8bit(4, 8)
    with pytest.raises(RuntimeError, match=r"not quantized.*move the layer to a device first"):
        layer(torch.tensor([1]))
    with pytest.raises(NotImplementedError, match="not quantized"):
        layer.state_dict()


@pytest.mark.parametrize("nested", [False, True])
def test_saved_and_loaded(device, nested):
    layer = Embedding8bit(20, 8).to(device)
    index = torch.arange(20, device=device)
    state = layer.state_dict()
    assert list(state) == ["weight", "SCB", "weight_format"]
    other = Embedding8bit(20, 8).to(device)
    holder = nn.Sequential(other) if nested else other
    holder.load_state_dict({f"0.{k}": v for k, v in state.items()} if nested else state)
    assert torch.equal(other(index), layer(index))
    floats = nn.Embedding(20, 8)
    other.load_state_dict(floats.state_dict())
    assert (other(index).cpu() - floats.weight).abs().max() < 0.05
    with pytest.raises(RuntimeError, match="checkpoint into non-quantized Embedding8bit"):
        Embedding8bit(20, 8).load_state_dict(state)


def test_copies_and_moves_keep_the_table(device):
    layer = Embedding8bit(20, 8).to(device)
    index = torch.arange(20, device=device)
    want = layer(index)
    model = nn.Sequential(layer).half().to(device)
    for other in (model[0], copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(index), want) and other.weight.dtype == torch.int8
    assert torch.equal(layer.cpu()(index.cpu()), want.cpu())


def test_exported(device):
    layer = Embedding8bit(20, 8).to(device)
    index = torch.tensor([[3, 19]], device=device)
    want = layer(index)
    for strict in (False, True):
        program = torch.export.export(layer, (index,), strict=strict)
        assert torch.equal(program.module()(index), want)


def test_statistics_are_those_of_the_present_weight(device):
    layer, other = Embedding8bit(20, 8).to(device), Embedding8bit(20, 8).to(device)
    index = torch.arange(20, device=device)
    assert not torch.equal(layer(index), other(index))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(index), other(index))
    layer = layer.cpu().to(device)
    other = Embedding8bit(20, 8).to(device)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(index), other(index))
    layer.weight = copy.deepcopy(Embedding8bit(20, 8).to(device).weight)
    codes, stats = layer.weight.data, layer.weight.SCB
    torch.testing.assert_close(layer(index), codes.float() * stats[:, None] / 127)
