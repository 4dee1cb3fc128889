# SPDX-License-Identifier: MIT
"""The parameter of packed 4-bit codes: quantizing, moving, copying, looking up its state."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

ATTRIBUTES = {
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
}
STORAGES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32]


def weight():
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(5))


def quantized(device="cpu", **settings):
    return Params4bit(weight(), **settings).to(device)


def same(a, b):
    """Whether two parameters have the same bytes and equal states."""
    return torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)) and (
        a.quant_state == b.quant_state
    )


def test_signature_and_defaults():
    parameters = inspect.signature(Params4bit.__new__).parameters
    assert {n: p.default for n, p in list(parameters.items())[1:-1]} == {
        "data": None,
        "requires_grad": False,
        "quant_state": None,
        "blocksize": None,
        "compress_statistics": True,
        "quant_type": "fp4",
        "quant_storage": torch.uint8,
        "module": None,
        "bnb_quantized": False,
    }
    assert set(Params4bit().__dict__) == ATTRIBUTES
    param = Params4bit(torch.ones(3), _is_hf_initialized=True, anything=1)
    assert set(param.__dict__) == ATTRIBUTES and param.blocksize == 64
    assert isinstance(param, nn.Parameter) and not param.requires_grad
    assert Params4bit().numel() == 0
    assert Params4bit(torch.ones(2), requires_grad=True).requires_grad


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", STORAGES)
def test_moving_quantizes(device, storage, quant_type, nested):
    settings = dict(quant_type=quant_type, compress_statistics=nested, quant_storage=storage)
    param = Params4bit(weight(), blocksize=128, **settings)
    assert param.to(device) is param
    packed, state = quantize_4bit(weight().to(device), blocksize=128, **settings)
    assert torch.equal(param.data.view(torch.uint8), packed.view(torch.uint8))
    assert param.quant_state == state and param.bnb_quantized
    assert param.dtype == storage and param.shape == (96 * 32 // storage.itemsize, 1)
    assert set(param.__dict__) == ATTRIBUTES and param.device.type == device


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to("cpu"),
        lambda p: p.to(device="cpu"),
        lambda p: p.cpu(),
        lambda p: p.to("cpu", torch.float16),
        lambda p: p.to(torch.ones(1, dtype=torch.float64)),
    ],
)
def test_every_way_to_move_quantizes(move):
    param = Params4bit(weight())
    assert move(param) is param and param.bnb_quantized
    assert param.quant_state.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_quantizes_and_moves():
    param = Params4bit(weight()).cuda()
    assert param.is_cuda and same(param.cpu(), quantized())
    assert Params4bit(weight()).cuda(0).device == torch.device("cuda", 0)


@pytest.mark.parametrize("numel", [7, 1, 64, 130])
def test_any_shape(device, numel):
    values = torch.randn(numel)
    param = Params4bit(values).to(device)
    assert param.shape == ((numel + 1) // 2, 1)
    back = dequantize_4bit(param.data, param.quant_state)
    assert back.shape == (numel,)
    cube = Params4bit(torch.randn(3, 5, 7).to(torch.bfloat16)).to(device)
    assert dequantize_4bit(cube.data, cube.quant_state).shape == (3, 5, 7)
    strided = Params4bit(weight().t()).to(device)
    want, _ = quantize_4bit(weight().t().contiguous().to(device))
    assert torch.equal(strided.data, want)


def test_casts_of_floats():
    param = Params4bit(weight(), quant_type="nf4", blocksize=128)
    for cast in (
        param.to(torch.float16),
        param.half(),
        param.to(dtype=torch.float16),
    ):
        assert type(cast) is Params4bit and cast.dtype == torch.float16
        assert not cast.bnb_quantized and cast.blocksize == 128 and cast.quant_type == "nf4"
    assert param.dtype == torch.float32 and param.float() is param
    assert param.double().dtype == torch.float64 and param.bfloat16().dtype == torch.bfloat16


@pytest.mark.parametrize("storage", STORAGES)
def test_casts_leave_bytes_alone(device, storage):
    param = quantized(device, quant_storage=storage)
    before = param.data.clone()
    for cast in (
        *(param.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        *(param.half(), param.bfloat16(), param.float(), param.double()),
        *(param.type(torch.float16), param.to(device, torch.float16)),
    ):
        assert type(cast) is Params4bit and cast.dtype == storage
        assert torch.equal(cast.data.view(torch.uint8), before.view(torch.uint8))
        assert cast.quant_state is param.quant_state


def test_a_second_move_keeps_bytes(device):
    param = quantized(device, compress_statistics=True)
    moved = param.to("cpu")
    assert type(moved) is Params4bit and moved.bnb_quantized and moved.module is None
    assert moved.quant_state is param.quant_state
    assert same(moved, quantized())
    assert moved.quant_state.absmax.device == moved.device
    if device == "cpu":
        assert moved.data_ptr() == param.data_ptr()


def test_meta(device):
    param = Params4bit(weight()).to("meta")
    assert type(param) is Params4bit and param.is_meta and not param.bnb_quantized
    assert param.shape == (96, 64)
    with pytest.raises(NotImplementedError, match="meta"):
        param.to("cpu")
    param = quantized(device)
    moved = param.to("meta")
    assert moved.is_meta and moved.quant_state is param.quant_state and moved.bnb_quantized
    assert same(param.to("cpu"), quantized())  # nothing of it went away
    back = Params4bit(param.data, **moved.__dict__).to(device)  # as offloading hooks do
    assert same(back.to("cpu"), quantized())


def test_what_cannot_be_quantized():
    cases = [
        (dict(blocksize=48), ValueError, "blocksize"),
        (dict(quant_type="int4"), ValueError, "quant_type"),
        (dict(requires_grad=True), RuntimeError, "requires_grad=True"),
    ]
    for settings, error, message in cases:
        param = Params4bit(weight(), **settings)
        with pytest.raises(error, match=message):
            param.to("cpu")
        assert not param.bnb_quantized and torch.equal(param.data, weight())
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        Params4bit(weight().double()).to("cpu")


def test_quantizing_again_with_an_old_state(device):
    # How other packages merge adapters: they edit the attributes and hand them back.
    param = quantized(device, quant_type="nf4")
    attributes = param.__dict__
    attributes["bnb_quantized"] = False
    attributes["requires_grad"] = False
    attributes.pop("data", None)
    new = Params4bit((weight() * 2).to("cpu"), **attributes).to(device)
    assert same(new, Params4bit(weight() * 2, quant_type="nf4").to(device))
    assert set(new.__dict__) == ATTRIBUTES


@pytest.mark.parametrize("storage", STORAGES)
def test_numbers_with_the_attributes_of_codes_are_quantized(device, storage):
    param = quantized(device, quant_type="nf4", quant_storage=storage)
    new = Params4bit(weight() * 2, requires_grad=False, **param.__dict__)
    assert not new.bnb_quantized and new.quant_state is None
    want = Params4bit(weight() * 2, quant_type="nf4", quant_storage=storage).to(device)
    assert same(new.to(device), want)


def test_a_copy_from_attributes(device):
    param = quantized(device)
    new = Params4bit(param.data, requires_grad=False, **param.__dict__).to(device)
    assert same(new, param) and new.quant_state is param.quant_state
    assert set(new.__dict__) == ATTRIBUTES


def test_quantizing_in_inference_mode_allows_training():
    layer = Linear4bit(64, 96, compute_dtype=torch.float32)
    with torch.inference_mode():
        layer.to("cpu")
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["float", "quantized"])
@pytest.mark.parametrize("nested", [False, True])
def test_copies(device, stage, nested):
    param = Params4bit(weight(), quant_type="nf4", compress_statistics=nested).to(
        device if stage == "quantized" else "meta"
    )
    if stage == "float":
        param = Params4bit(weight(), quant_type="nf4", compress_statistics=nested)
    before = copy.copy(param.__dict__)

    shallow = copy.copy(param)
    assert type(shallow) is Params4bit and shallow.data_ptr() == param.data_ptr()
    assert shallow.quant_state is param.quant_state

    buffer = io.BytesIO()
    torch.save(param, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(param), pickle.loads(pickle.dumps(param)), loaded):
        assert type(other) is Params4bit and not other.requires_grad
        assert other.data_ptr() != param.data_ptr() and torch.equal(other.data, param.data)
        assert set(other.__dict__) == set(param.__dict__) == ATTRIBUTES
        assert other.quant_state == param.quant_state and other.quant_type == "nf4"
        if stage == "quantized":
            assert other.quant_state is not param.quant_state
            assert other.absmax.data_ptr() != param.absmax.data_ptr()
    assert all(param.__dict__[key] is value for key, value in before.items())


def test_a_deep_copy_belongs_to_the_module_it_was_copied_with():
    layer = Linear4bit(64, 96).to("cpu")
    assert copy.deepcopy(layer.weight).module is layer
    copied = copy.deepcopy(layer)
    assert copied.weight.module is copied and copied.weight.quant_state is copied.quant_state
    assert copied.quant_state is not layer.quant_state
    memo = {}
    assert copy.deepcopy(layer.weight, memo) is copy.deepcopy(layer.weight, memo)


def test_pieces_keep_the_class(device):
    param = quantized(device)
    for pieces, sizes in (
        (torch.chunk(param, 2, dim=0), [1536, 1536]),
        (torch.chunk(input=param, chunks=2), [1536, 1536]),
        (torch.split(param, 1000), [1000, 1000, 1000, 72]),
        (torch.split(param, [72, 3000]), [72, 3000]),
    ):
        assert isinstance(pieces, tuple) and [len(p) for p in pieces] == sizes
        assert all(type(p) is Params4bit for p in pieces)
        for piece in pieces:
            assert piece.__dict__ == param.__dict__ and piece.quant_state is param.quant_state
        assert torch.equal(torch.cat(pieces), param.data)
    for other in (
        *(param.detach(), param.clone(), param.view(-1), param.t(), param[:2], param.data),
        *(torch.empty_like(param), param.new_zeros(2), param.chunk(2)[0], param.split(9)[0]),
    ):
        assert type(other) is torch.Tensor


# --- names --------------------------------------------------------------------------------------


def test_parts_of_the_state_are_attributes(device):
    param = quantized(device, compress_statistics=True, quant_type="nf4")
    state = param.quant_state
    assert param.absmax is state.absmax and param.code is state.code
    assert param.quant_map is state.code and param.offset is state.offset
    assert param.state2 is state.state2 and param.nested_absmax is state.state2.absmax
    assert param.nested_blocksize == 256 and param.nested_quant_map is state.state2.code
    assert param.nested_dtype == torch.float32 and param.nested_offset is state.offset
    assert param.quant_state.bitsandbytes__nf4.dtype == torch.uint8
    with pytest.raises(AttributeError):
        param.absmax = state.absmax


def test_parts_that_are_not_there():
    names = ["absmax", "code", "quant_map", "offset", "state2", "nested_absmax", "nested_offset"]
    for name in names:
        with pytest.raises(AttributeError, match=f"'Params4bit' object has no attribute '{name}'"):
            getattr(Params4bit(weight()), name)
    flat = quantized(compress_statistics=False)
    for name in ("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype"):
        with pytest.raises(AttributeError, match=f"'Params4bit' object has no attribute '{name}'"):
            getattr(flat, name)
    assert flat.nested_offset is None and flat.state2 is None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flat.no_such_name
    assert not hasattr(Params4bit, "__getattr__")


# --- from_prequantized --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_packed", "prefix"), [(True, ""), (True, "model.l.weight."), (False, "")]
)
@pytest.mark.parametrize("nested", [False, True])
def test_from_prequantized(device, nested, is_packed, prefix):
    param = quantized("cpu", compress_statistics=nested, quant_storage=torch.bfloat16)
    entries = param.quant_state.as_dict(packed=is_packed)
    entries = {prefix + key: value for key, value in entries.items()}
    before = dict(entries)
    layer = Linear4bit(64, 96)
    new = Params4bit.from_prequantized(param.data, entries, device=device, module=layer, extra=1)
    assert type(new) is Params4bit and new.device.type == device and not new.requires_grad
    assert set(new.__dict__) == ATTRIBUTES and new.bnb_quantized
    assert (new.blocksize, new.quant_type) == (64, "fp4")
    assert new.compress_statistics is nested and new.quant_storage == torch.bfloat16
    assert new.module is layer and layer.quant_state is new.quant_state
    assert same(new.to("cpu"), param) and entries == before


def test_from_prequantized_refuses(device):
    param = quantized(device)
    entries = param.quant_state.as_dict(packed=True)
    blob = entries.pop("quant_state.bitsandbytes__fp4")
    cases = [
        (entries, ValueError),
        (entries | {"quant_state.bitsandbytes__int4": blob}, ValueError),
        (entries | {"quant_state.bitsandbytes__fp4": blob, "bias": blob}, AssertionError),
    ]
    for bad, error in cases:
        with pytest.raises(error):
            Params4bit.from_prequantized(param.data, bad, device=device)


def test_scales_by_columns_are_put_in_order():
    # What the public package saves after inference on some CPUs: [blocks per row, rows], bfloat16.
    param = quantized(compress_statistics=False)
    entries = param.quant_state.as_dict(packed=True)
    entries["absmax"] = entries["absmax"].view(96, 1).repeat(1, 1).t().bfloat16()
    new = Params4bit.from_prequantized(param.data, entries, device="cpu")
    assert new.absmax.shape == (96,) and new.absmax.dtype == torch.float32
    assert torch.equal(new.absmax, param.absmax.bfloat16().float())


def test_isinstance_by_public_paths():
    assert bnb.nn.modules.Params4bit is Params4bit is bnb.nn.Params4bit
