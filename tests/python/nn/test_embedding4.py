# SPDX-License-Identifier: MIT
"""The 4-bit embeddings: only the looked-up rows are dequantized, and they are the table's."""

import copy
import inspect
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Embedding4bit, EmbeddingFP4, EmbeddingNF4, Params4bit
from bitsandbytes.nn.embedding4 import dequantize_rows

CLASSES = [EmbeddingFP4, EmbeddingNF4]


def table(layer):
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_signatures():
    names = {
        "dtype": None,
        "quant_type": "fp4",
        "quant_storage": torch.uint8,
        "device": None,
    }
    for cls in (Embedding4bit, *CLASSES):
        parameters = list(inspect.signature(cls).parameters.values())
        assert [p.name for p in parameters[:2]] == ["num_embeddings", "embedding_dim"]
        want = {k: v for k, v in names.items() if cls is Embedding4bit or k != "quant_type"}
        assert {p.name: p.default for p in parameters[2:]} == want
        assert [p.name for p in parameters[2:]] == list(want)
        assert issubclass(cls, Embedding4bit) and issubclass(cls, nn.Embedding)
        assert getattr(bnb.nn.modules, cls.__name__) is cls
    layer = EmbeddingNF4(10, 64, torch.float16, torch.bfloat16)
    assert layer.dtype == layer.weight.dtype == torch.float16 and layer.quant_state is None
    assert layer.weight.quant_storage == torch.bfloat16 and layer.weight.module is layer
    assert layer.weight.quant_type == "nf4" and not layer.weight.requires_grad
    assert EmbeddingFP4(10, 64).weight.quant_type == "fp4"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 50, 1, 2, 65, 97, 200])
def test_rows_are_those_of_the_table(device, dim, storage, dtype, cls):
    layer = cls(37, dim, dtype, storage).to(device)
    assert type(layer.weight) is Params4bit and layer.weight.dtype == storage
    for index in (
        torch.tensor([[36, 0, 1], [17, 17, 35]]),
        torch.arange(37, dtype=torch.int32),
        torch.tensor(36),
        torch.empty(2, 0, dtype=torch.long),
    ):
        rows = layer(index.to(device))
        assert rows.dtype == dtype and not rows.requires_grad
        assert rows.shape == (*index.shape, dim)
        assert torch.equal(rows, table(layer)[index.to(device).long()])


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(40, 256), (700, 33), (3, 4096), (9, 600)])
def test_rows_with_nested_scales_and_other_blocks(device, shape, blocksize):
    packed, state = quantize_4bit(
        torch.randn(shape, device=device), blocksize=blocksize, compress_statistics=True
    )
    rows = torch.tensor([0, shape[0] - 1, shape[0] // 2], device=device)
    out = dequantize_rows(packed, state, rows, torch.float32)
    torch.testing.assert_close(out, dequantize_4bit(packed, state)[rows], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dim", [64, 50])
def test_nothing_else_is_dequantized(device, dim):
    layer = EmbeddingNF4(5000, dim).to(device)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.data_ptr() != layer.weight.data_ptr():
                # In memory: a view of one number for all rows has one.
                sizes.append(result.untyped_storage().nbytes() // result.itemsize)
            return result

    with Watch():
        layer(torch.tensor([4, 4000], device=device))
    assert len(sizes) > 3 and max(sizes) <= 2 * 2 * 64


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_of_quantization(device, cls):
    layer = cls(100, 128)
    with torch.no_grad():
        layer.weight.data = torch.randint(0, 2, (100, 128)) * 2.0 - 1
    exact = layer.weight.data.clone().to(device)
    assert torch.equal(layer.to(device)(torch.arange(100, device=device)), exact)
    layer, uniform = cls(100, 128), nn.Embedding(100, 128, _weight=torch.rand(100, 128))
    layer.load_state_dict(uniform.state_dict())
    index = torch.arange(100, device=device)
    error = (layer.to(device)(index) - uniform.to(device)(index)).abs().max()
    assert 0.02 < error <= 0.20


def test_rows_across_blocks_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "bitsandbytes.nn.modules"):
        EmbeddingNF4(10, 128)
        assert caplog.text == ""
        EmbeddingNF4(10, 65)
    assert "inference" in caplog.text and "65" in caplog.text and "64" in caplog.text


def test_an_unquantized_embedding_says_so():
    layer = EmbeddingNF4(10, 64)
    with pytest.raises(NotImplementedError, match="not quantized"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match=r"^EmbeddingNF4: quantization state not initialized"):
        layer(torch.tensor([1]))


def test_a_lost_state_is_recovered(device):
    layer, index = EmbeddingNF4(10, 64).to(device), torch.arange(10, device=device)
    want, state = layer(index), layer.quant_state
    layer.weight.quant_state = None
    assert torch.equal(layer(index), want) and layer.weight.quant_state is state
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(layer(index), want) and type(layer.weight) is Params4bit


def test_copies_and_moves(device):
    layer, index = EmbeddingNF4(10, 64).to(device), torch.arange(10, device=device)
    want = layer(index)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(device)):
        assert torch.equal(other(index), want) and other.quant_state is other.weight.quant_state
    layer.half()
    assert torch.equal(layer(index), want)
    layer = EmbeddingNF4(10, 64, device="meta")
    assert layer.weight.is_meta and layer.to_empty(device=device).weight.shape == (10, 64)


def test_compiles_into_one_graph(device, compile_fresh):
    for dim in (64, 50):
        layer = EmbeddingNF4(10, dim).to(device)
        index = torch.tensor([[3, 9]], device=device)
        compiled = compile_fresh(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(index), layer(index))


@pytest.mark.parametrize("dim", [64, 50])
@pytest.mark.parametrize("cls", [*CLASSES, bnb.nn.Embedding8bit])
def test_numbers_of_no_row_are_errors(cls, dim):
    layer = cls(10, dim).to("cpu")
    for number in (10, 1000, -1, 2**62):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([3, number]))
    for dtype in (torch.float32, torch.bool, torch.uint8):
        with pytest.raises(ValueError, match=rf"^{cls.__name__}: input must be int32 or int64"):
            layer(torch.ones(2, dtype=dtype))
