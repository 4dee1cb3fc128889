# SPDX-License-Identifier: MIT
"""State dicts of layers with packed 4-bit weights: what is saved, and that it loads everywhere."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import EmbeddingNF4, Linear4bit, LinearFP4, LinearNF4, Params4bit
from reference import codes4

STORAGES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]
GOLDEN = {
    "nf4": dict(quant_type="nf4", compress_statistics=False),
    "nf4dq": dict(quant_type="nf4"),
    "fp4": dict(quant_type="fp4", compress_statistics=False),
    "nf4dq_bf16storage": dict(quant_type="nf4", quant_storage=torch.bfloat16),
}


def make(cls=LinearNF4, **settings):
    return cls(64, 96, **settings)


def quantized(device="cpu", cls=LinearNF4, **settings):
    return make(cls, **settings).to(device)


def inputs(device="cpu"):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).to(device)


def values(layer, dtype=None):
    state = copy.copy(layer.weight.quant_state)
    state.dtype = dtype or state.dtype
    return dequantize_4bit(layer.weight.data, state)


def equal_bytes(a, b):
    """Whether tensors are equal, compared as bytes: packed floats may be NaN."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def assert_same_state(state, other):
    assert list(state) == list(other)
    for key, value in state.items():
        assert equal_bytes(value, other[key]), key


# --- what is saved ------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_keys_and_their_order(device, quant_type, storage):
    settings = dict(quant_type=quant_type, quant_storage=storage)
    layer = quantized(device, Linear4bit, **settings)
    model = nn.Sequential(layer)
    packed = f"weight.quant_state.bitsandbytes__{quant_type}"
    keys = ["weight", "bias", "weight.absmax", "weight.quant_map", "weight.nested_absmax"]
    keys += ["weight.nested_quant_map", packed]
    state = layer.state_dict()
    assert list(state) == keys and list(model.state_dict()) == [f"0.{key}" for key in keys]
    assert all(type(value) is torch.Tensor for value in state.values())
    want = {
        "weight": (storage, (3072 // storage.itemsize, 1)),
        "weight.absmax": (torch.uint8, (96,)),
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (1,)),
        "weight.nested_quant_map": (torch.float32, (256,)),
    }
    assert {key: (state[key].dtype, tuple(state[key].shape)) for key in want} == want
    text = bytes(state[packed].tolist()).decode()
    offset = layer.quant_state.offset.item()
    assert text == (
        f'{{"quant_type": "{quant_type}", "blocksize": 64, "dtype": "float32", "shape": [96, 64], '
        f'"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset!r}}}'
    )
    pointers = [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)

    state = quantized(device, Linear4bit, compress_statistics=False, bias=False, **settings)
    state = state.state_dict()
    assert list(state) == ["weight", "weight.absmax", "weight.quant_map", packed]
    assert state["weight.absmax"].dtype == torch.float32
    assert list(json.loads(bytes(state[packed].tolist()))) == [
        *("quant_type", "blocksize", "dtype", "shape")
    ]


def test_an_unquantized_layer_saves_floats():
    state = make().state_dict()
    assert list(state) == ["weight", "bias"] and state["weight"].shape == (96, 64)


def test_live_objects():
    layer = quantized()
    state = layer.state_dict(keep_vars=True)
    assert state["weight"] is layer.weight and state["weight.absmax"] is layer.quant_state.absmax


def test_files(device, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = quantized(device)
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    for state in (
        safetensors.load_file(tmp_path / "layer.safetensors"),
        torch.load(tmp_path / "layer.pt", weights_only=True),
    ):
        other = make()
        other.load_state_dict(state)
        assert torch.equal(other.to(device)(inputs(device)), layer(inputs(device)))
    buffer = io.BytesIO()
    torch.save(LinearNF4(1024, 1024, bias=False).to(device).state_dict(), buffer)
    assert buffer.tell() < 0.3 * 1024 * 1024 * 2  # of a float16 weight


# --- quantized checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "target", ["float", "quantized", "other settings", "used", "plain", "lost", "meta"]
)
def test_a_quantized_checkpoint_loads_into(device, target, nested, assign, strict):
    source = quantized(device, compress_statistics=nested)
    state = source.state_dict()
    kept = copy.deepcopy(state)
    layer = make(LinearFP4, compress_statistics=not nested) if "other" in target else make()
    if target == "meta":
        layer = make(device="meta")
        layer = layer if assign else layer.to_empty(device=device)
    elif target != "float":
        layer.to(device)
    if target == "used":
        layer(inputs(device))
    if target in ("plain", "lost"):
        data = layer.weight.data if target == "lost" else torch.randn(96, 64, device=device)
        layer.weight = nn.Parameter(data, requires_grad=False)
    weight = layer.weight
    result = layer.load_state_dict(state, strict=strict, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert type(layer.weight) is Params4bit and layer.weight.bnb_quantized
    assert assign or target in ("plain", "lost") or layer.weight is weight
    assert layer.quant_state is layer.weight.quant_state
    assert layer.weight.module is layer
    assert layer.weight.quant_type == "nf4" and layer.weight.compress_statistics is nested
    assert_same_state(layer.to(device).state_dict(), kept)
    assert torch.equal(layer(inputs(device)), source(inputs(device)))
    # Nothing is shared unless it was to be, and nothing taken from the dict.
    assert_same_state(state, kept)
    if not assign:
        assert not {v.data_ptr() for v in state.values()} & {
            *(v.data_ptr() for v in layer.state_dict().values()),
            layer.quant_state.code.data_ptr(),
        }


def test_loading_in_place(device):
    layer, source = quantized(device), quantized(device)
    pointers = [layer.weight.data_ptr(), layer.quant_state.absmax.data_ptr()]
    state = layer.quant_state
    layer.load_state_dict(source.state_dict())
    assert pointers == [layer.weight.data_ptr(), layer.quant_state.absmax.data_ptr()]
    assert layer.quant_state is state and state == source.quant_state
    own = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(layer.state_dict())
    assert_same_state(layer.state_dict(), own)


def test_loading_changes_no_table_of_others(device):
    layer, other = quantized(device), quantized(device)
    state = layer.state_dict()
    for key in ("weight.quant_map", "weight.nested_quant_map"):
        state[key] = state[key] / 2
    layer.load_state_dict(state)
    assert torch.equal(layer.quant_state.state2.code, state["weight.nested_quant_map"])
    table = bnb.functional.create_dynamic_map().to(device)
    for untouched in (other, quantized(device)):
        assert torch.equal(untouched.quant_state.state2.code, table)
        assert untouched.quant_state.code.max() == 1


@pytest.mark.parametrize("target", STORAGES)
@pytest.mark.parametrize("source", STORAGES)
def test_storages_are_converted(source, target):
    saved = quantized(quant_storage=source)
    for layer in (make(quant_storage=target), quantized(quant_storage=target)):
        layer.load_state_dict(saved.state_dict())
        assert layer.weight.dtype == target == layer.weight.quant_storage
        assert torch.equal(layer(inputs()), saved(inputs()))
    layer.load_state_dict(saved.state_dict(), assign=True)
    assert layer.weight.dtype == source == layer.weight.quant_storage
    odd, wide = LinearNF4(5, 7).to("cpu"), LinearNF4(5, 7, quant_storage=torch.float32)
    wide.load_state_dict(odd.state_dict())
    assert torch.equal(values(wide), values(odd))


def test_it_stays_quantized_when_moved(device):
    layer = make()
    layer.load_state_dict(quantized().state_dict())
    before = layer.weight.data.clone()
    layer.to(device)
    assert torch.equal(layer.weight.data.cpu(), before)


def test_models(device):
    def model():
        return nn.Sequential(nn.Linear(64, 64), make(), nn.Sequential(LinearFP4(96, 3)))

    source = model().to(device)
    for target in (model(), model().to(device)):
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.to(device)(inputs(device)), source(inputs(device)))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        target.load_state_dict({**source.state_dict(), "1.weight.extra": torch.ones(1)})
    state = source.state_dict()
    del state["1.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"1.bias"'):
        target.load_state_dict(state)
    assert target.load_state_dict(state, strict=False).missing_keys == ["1.bias"]


# --- floating-point checkpoints -----------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_checkpoint_loads_into(device, dtype, assign):
    saved = nn.Linear(64, 96).to(device, dtype).state_dict()
    for layer in (make(), make(quant_storage=torch.bfloat16), make().half(), quantized(device)):
        was_quantized, old = layer.weight.bnb_quantized, layer.weight.dtype
        storage = layer.weight.quant_storage
        want = make() if was_quantized else make().to(old)
        want.load_state_dict(saved, assign=assign)
        want.to(device)
        layer.load_state_dict(saved, assign=assign)
        assert type(layer.weight) is Params4bit and layer.weight.module is layer
        assert layer.weight.bnb_quantized == was_quantized
        if not was_quantized:
            assert layer.weight.dtype == (dtype if assign else old)
            assert layer.weight.shape == (96, 64) and not layer.weight.requires_grad
        layer.to(device)
        assert layer.weight.quant_storage == storage == layer.weight.dtype
        assert torch.equal(values(layer), values(want))


def test_a_float_checkpoint_is_quantized_as_the_layer_is(device):
    layer = quantized(device, LinearFP4, compress_statistics=False)
    state = layer.quant_state
    linear = nn.Linear(64, 96).double()
    layer.load_state_dict(linear.state_dict())
    assert layer.quant_state is state and state.quant_type == "fp4" and not state.nested
    assert state.dtype == torch.float32
    want, _ = bnb.functional.quantize_fp4(linear.weight.detach().float().to(device))
    assert torch.equal(layer.weight.data, want)


def test_a_checkpoint_cast_to_16_bits(device):
    layer = quantized(device)
    state = {k: v.half() if v.is_floating_point() else v for k, v in layer.state_dict().items()}
    x, want = torch.randn(3, 64, device=device), values(layer)
    layer.load_state_dict(state)
    torch.testing.assert_close(values(layer), want, rtol=2e-3, atol=0)
    assert layer(x).isfinite().all()


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_what_does_not_fit_changes_nothing(device, strict):
    good = quantized(device).state_dict()
    packed = "weight.quant_state.bitsandbytes__nf4"
    cases = [
        (LinearNF4(64, 95).to(device).state_dict(), r"of shape \[96, 64\].*\[95, 64\]"),
        (good | {"weight": good["weight"][:-1]}, "3072 bytes"),
        (good | {"weight": torch.randn(96, 64)}, "3072 bytes"),
        (good | {"weight.absmax": good["weight.absmax"][:5]}, r"of 96 elements.*got shape \[5\]"),
        ({k: v for k, v in good.items() if k != packed}, "quant_type"),
        ({k: v for k, v in good.items() if k != "weight.quant_map"}, "quant_map"),
        ({k: v for k, v in good.items() if k != "weight"}, "without its codes"),
        ({k: v for k, v in good.items() if "." not in k}, "packed codes with their state"),
        ({"weight": torch.randn(95, 64), "bias": good["bias"]}, r"\[95, 64\]"),
    ]
    facts = bnb.functional.unpack_tensor_to_dict(good[packed])
    for entry, value, message in [
        ("blocksize", 0, "blocksize must be a whole number above 0, got 0"),
        ("blocksize", 2**40, r"blocksize must be one of \(32, "),
        ("nested_blocksize", None, "nested_blocksize must be a whole number"),
        ("nested_offset", [], "nested_offset must be a number"),
        ("shape", [96, "64"], "shape must be a list of sizes"),
        ("dtype", 7, "dtype must be one of"),
    ]:
        changed = bnb.functional.pack_dict_to_tensor(facts | {entry: value})
        cases.append((good | {packed: changed}, message))
    cases += [
        (good | {packed: good[packed][:-1]}, f"{packed[7:]} must be JSON in bytes"),
        (good | {packed: good[packed].float()}, "must be JSON in bytes"),
        (good | {"weight.absmax": good["weight.absmax"].float()}, "absmax must be uint8"),
        (good | {"weight.quant_map": good["weight.quant_map"][:15]}, "quant_map must be of 16"),
        (good | {"weight.nested_absmax": torch.ones(2)}, "nested_absmax must be of 1 elements"),
        (good | {"weight.nested_quant_map": torch.ones(16)}, "nested_quant_map must be of 256"),
    ]
    for state, message in cases:
        layer = quantized(device)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**state, "bias": before["bias"]}, strict=strict)
        assert_same_state(layer.state_dict(), before)
    layer = make()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(LinearNF4(64, 95).to(device).state_dict())
    assert not layer.weight.bnb_quantized


def test_the_meta_device_takes_nothing():
    layer = make(device="meta")
    with pytest.warns(UserWarning, match="meta") as warnings:
        layer.load_state_dict(quantized().state_dict())
    assert "weight: loading into a layer on the meta device does nothing" in str(
        [w.message for w in warnings]
    )
    assert layer.weight.is_meta and not layer.weight.bnb_quantized


# --- recorded files -----------------------------------------------------------------------------


def recorded_state(tensors):
    return {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}


def description(state):
    blob = next(value for key, value in state.items() if "bitsandbytes__" in key)
    return json.loads(bytes(blob.tolist()))


def nibbles(packed):
    return codes4.unpack(packed.cpu().flatten().view(torch.uint8).numpy(), 256 * 192)


@pytest.fixture(params=GOLDEN)
def recording(request, golden):
    """Settings of a layer that the public package ran on a GPU, and what it recorded."""
    tensors = {
        key.split(".", 1)[1]: value
        for key, value in golden("linear4bit").items()
        if key.split(".")[0] == request.param
    }
    return GOLDEN[request.param] | {"compute_dtype": torch.bfloat16}, tensors


def test_quantizing_gives_what_is_recorded(device, recording):
    settings, tensors = recording
    layer = Linear4bit(256, 192, **settings).to(torch.bfloat16)
    layer.load_state_dict({"weight": tensors["orig"]}, strict=False)
    state, want = layer.to(device).state_dict(), recorded_state(tensors)
    assert list(sorted(state)) == sorted(want)
    for key in ("weight.absmax", "weight.quant_map", "weight.nested_quant_map"):
        assert key not in want or equal_bytes(state[key].cpu(), want[key]), key

    # A GPU's reciprocal may be a unit off: codes of numbers that lie on a threshold differ.
    codes, recorded = nibbles(state["weight"]), nibbles(want["weight"])
    differ = np.flatnonzero(codes != recorded)
    assert state["weight"].dtype == want["weight"].dtype and differ.size <= 4
    if differ.size:
        scale = 1 / want["weight.absmax"].numpy()[differ // 64]
        s = tensors["orig"].float().flatten().numpy()[differ] * scale
        near = [codes4.encode(settings["quant_type"], s * (1 + e * 2.0**-22)) for e in (-1, 1)]
        assert ((recorded[differ] == near[0]) | (recorded[differ] == near[1])).all()

    # Nor does it add up the scales in this order.
    text, wanted = description(state), description(want)
    offset = [d.pop("nested_offset", 0) for d in (text, wanted)]
    assert text == wanted and offset[0] == pytest.approx(offset[1], rel=2**-23)
    if "weight.nested_absmax" in want:
        nested = state["weight.nested_absmax"].cpu()
        torch.testing.assert_close(
            nested, want["weight.nested_absmax"], rtol=0, atol=2**-23 * offset[1]
        )


def test_recorded_layers_load_and_run(device, gpu_kernels, recording):
    settings, tensors = recording
    state = recorded_state(tensors)
    for layer in (
        Linear4bit(256, 192, **settings),
        Linear4bit(256, 192, **settings).to(device),
        Linear4bit(256, 192, device="meta", **settings),
    ):
        layer.load_state_dict(state, assign=layer.weight.is_meta)
        saved = layer.to(device).state_dict()
        assert set(saved) == set(state)
        assert all(equal_bytes(saved[key].cpu(), value) for key, value in state.items())
        for rows in (1, 5, 64):
            if f"x{rows}" in tensors:
                x, recorded = tensors[f"x{rows}"].to(device), tensors[f"y{rows}"].to(device)
                out = layer(x).double()
                # Kernels of a GPU round the weight in ways of their own.
                weight = values(layer, torch.float32 if gpu_kernels else x.dtype)
                slack = 2**-7 if gpu_kernels else 2**-20
                exact = x.double() @ weight.double().t() + layer.bias.double()
                torch.testing.assert_close(out, exact, rtol=2**-8, atol=slack)
                # With few rows the public package rounds more than once.
                torch.testing.assert_close(out, recorded.double(), rtol=2**-7, atol=2**-7)
                assert (out - exact).abs().mean() <= 1.01 * (recorded - exact).abs().mean()


# --- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dim", [64, 50])
def test_embeddings(device, dim, assign):
    source = EmbeddingNF4(30, dim).to(device)
    index = torch.arange(30, device=device)
    state = source.state_dict()
    assert list(state) == [
        *("weight", "weight.absmax", "weight.quant_map"),
        "weight.quant_state.bitsandbytes__nf4",
    ]
    for layer in (EmbeddingNF4(30, dim), EmbeddingNF4(30, dim).to(device)):
        layer.load_state_dict(state, assign=assign)
        assert torch.equal(layer.to(device)(index), source(index))
        layer.load_state_dict(nn.Embedding(30, dim).to(device).state_dict(), assign=assign)
        assert layer.weight.bnb_quantized and not torch.equal(layer(index), source(index))
