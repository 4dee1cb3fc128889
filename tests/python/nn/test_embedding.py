# SPDX-License-Identifier: MIT
"""Embeddings whose optimizer states stay in 32 bits."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitsandbytes as bnb

CLASSES = (bnb.nn.Embedding, bnb.nn.StableEmbedding)


@pytest.mark.parametrize("cls", CLASSES)
def test_signature(cls):
    parameters = list(inspect.signature(cls).parameters.values())
    names = [
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
        "_weight",
        "device",
        "dtype",
    ]
    names = names if cls is bnb.nn.StableEmbedding else names[:-1]
    assert [p.name for p in parameters] == names
    assert [p.default for p in parameters[2:8]] == [None, None, 2.0, False, False, None]
    assert issubclass(cls, nn.Embedding)
    assert getattr(bnb.nn.modules, cls.__name__) is cls


@pytest.mark.parametrize("cls", CLASSES)
def test_weight_starts_xavier_uniform(cls):
    layer = cls(300, 20, padding_idx=7)
    bound = (6 / 320) ** 0.5
    rows = torch.cat([layer.weight[:7], layer.weight[8:]]).detach()
    assert layer.weight[7].count_nonzero() == 0
    assert 0.95 * bound < rows.abs().max() <= bound
    assert rows.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert layer.weight[7].count_nonzero() == 0


def test_embedding_looks_up_rows(device):
    layer = bnb.nn.Embedding(10, 4, device=device)
    index = torch.tensor([[1, 9], [0, 1]], device=device)
    assert torch.equal(layer(index), layer.weight[index])
    assert layer.weight.device.type == device and layer.weight.requires_grad


def test_stable_embedding_normalises_rows(device):
    layer = bnb.nn.StableEmbedding(10, 6, device=device)
    with torch.no_grad():
        layer.norm.weight.uniform_()
        layer.norm.bias.uniform_()
    index = torch.tensor([[1, 9, 3]], device=device)
    want = F.layer_norm(layer.weight[index], (6,), layer.norm.weight, layer.norm.bias)
    out = layer(index)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert layer.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 3, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stable_embedding_device_and_dtype(device, dtype):
    layer = bnb.nn.StableEmbedding(10, 6, device=device, dtype=dtype)
    assert layer.weight.dtype == dtype and layer.weight.device.type == device
    assert layer.norm.weight.dtype == torch.float32 and layer.norm.weight.device.type == device
    assert layer.weight.requires_grad
    out = layer(torch.tensor([2, 3], device=device))
    assert out.dtype == dtype
    # The norm is computed in float32 and rounded once.
    assert torch.equal(out, layer.norm(layer.weight[2:4].float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stable_embedding_converted_as_a_whole(device, dtype):
    layer = bnb.nn.StableEmbedding(10, 6).to(device, dtype)
    assert layer(torch.tensor([2, 3], device=device)).dtype == dtype


def test_state_dict_and_given_weight():
    weight = torch.randn(5, 3)
    layer = bnb.nn.StableEmbedding(5, 3, _weight=weight)
    assert torch.equal(layer.weight, weight)
    assert list(layer.state_dict()) == ["weight", "norm.weight", "norm.bias"]
    other = bnb.nn.StableEmbedding(5, 3)
    other.load_state_dict(layer.state_dict())
    index = torch.arange(5)
    assert torch.equal(other(index), layer(index))
    assert list(bnb.nn.Embedding(5, 3).state_dict()) == ["weight"]


def test_meta_device():
    layer = bnb.nn.StableEmbedding(5, 3, device="meta")
    assert layer.weight.is_meta and layer.norm.weight.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("cls", CLASSES)
def test_optimizer_states_stay_in_32_bits(device, cls):
    layer = cls(300, 64).to(device)
    linear = nn.Linear(64, 128).to(device)
    optimizer = bnb.optim.Adam8bit([*layer.parameters(), *linear.parameters()], lr=1e-2)
    linear(layer(torch.arange(10, device=device))).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["state1"].dtype == torch.float32
    assert optimizer.state[linear.weight]["state1"].dtype == torch.uint8
