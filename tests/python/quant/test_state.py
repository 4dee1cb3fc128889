# SPDX-License-Identifier: MIT
"""QuantState: dictionary forms, legacy list form, comparison, copies."""

import copy
import inspect
import json
import pickle

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.functional import QuantState

NF4 = F.get_4bit_type("nf4", "cpu")


def eight_bit(device="cpu", nested=False, dtype=torch.float16):
    a = torch.randn(1000, dtype=dtype, device=device)
    return F.quantize_blockwise(a, blocksize=64, nested=nested)[1]


def four_bit(device="cpu", nested=False, quant_type="nf4"):
    a = torch.randn(64, 64, dtype=torch.bfloat16, device=device)
    state = F.quantize_4bit(a, quant_type=quant_type, compress_statistics=nested)[1]
    if nested:
        state.offset.fill_(2.6123046875)  # known to the tests of the JSON
    return state


STATES = {
    "8bit": eight_bit,
    "8bit nested": lambda device="cpu": eight_bit(device, nested=True),
    "nf4": four_bit,
    "nf4 nested": lambda device="cpu": four_bit(device, nested=True),
    "fp4": lambda device="cpu": four_bit(device, quant_type="fp4"),
}


def tensors_of(state):
    tensors = [state.absmax, state.code]
    return [*tensors, state.offset, *tensors_of(state.state2)] if state.nested else tensors


def assert_same(a, b):
    """Compares bit for bit, unlike `==`."""
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())
    fields = ("shape", "blocksize", "quant_type", "dtype", "nested")
    assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]


def test_constructor():
    parameters = inspect.signature(QuantState).parameters
    assert list(parameters) == [
        "absmax",
        "shape",
        "code",
        "blocksize",
        "quant_type",
        "dtype",
        "offset",
        "state2",
    ]
    assert all(p.default is None for name, p in parameters.items() if name != "absmax")
    state = QuantState(torch.ones(1))
    assert state.nested is False
    assert all(getattr(state, name) is None for name in parameters if name != "absmax")
    assert four_bit(nested=True).nested is True


def test_class_attributes():
    assert QuantState.valid_quant_types == ("fp4", "nf4")
    assert QuantState.valid_qs_type_keys == ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    assert QuantState.valid_qs_keys == [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]


# --- dictionaries -------------------------------------------------------------------------------

PLAIN = ["quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"]
NESTED = [
    "nested_absmax",
    "nested_blocksize",
    "nested_quant_map",
    "nested_dtype",
    "nested_offset",
]


def test_as_dict():
    state = four_bit()
    entries = state.as_dict()
    assert list(entries) == PLAIN
    assert entries["absmax"] is state.absmax and entries["quant_map"] is state.code
    assert entries["quant_type"] == "nf4" and entries["blocksize"] == 64
    assert entries["dtype"] == "bfloat16"
    assert entries["shape"] == (64, 64) and type(entries["shape"]) is tuple


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float32, "float32"),
        (None, "None"),
    ],
)
def test_as_dict_names_the_dtype(dtype, name):
    assert QuantState(torch.ones(1), code=NF4, dtype=dtype).as_dict()["dtype"] == name


def test_as_dict_nested():
    state = four_bit(nested=True)
    entries = state.as_dict()
    assert list(entries) == PLAIN + NESTED
    assert entries["nested_offset"] == 2.6123046875 and type(entries["nested_offset"]) is float
    assert entries["nested_dtype"] == "float32" and entries["nested_blocksize"] == 256
    # The table is shared by all states, and safetensors refuses shared memory.
    assert torch.equal(entries["nested_quant_map"], state.state2.code)
    assert entries["nested_quant_map"].data_ptr() != state.state2.code.data_ptr()


PACKED = {
    "fp4": '{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}',
    "nf4 nested": '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", '
    '"shape": [64, 64], "nested_blocksize": 256, "nested_dtype": "float32", '
    '"nested_offset": 2.6123046875}',
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_dict_is_the_published_text(name):
    entries = STATES[name]().as_dict(packed=True)
    tensors = ["absmax", "quant_map"]
    if "nested" in name:
        tensors += ["nested_absmax", "nested_quant_map"]
    key = f"quant_state.bitsandbytes__{name[:3]}"
    assert list(entries) == [*tensors, key]
    packed = entries[key]
    assert packed.dtype == torch.uint8 and packed.dim() == 1 and packed.device.type == "cpu"
    assert bytes(packed.tolist()).decode() == PACKED[name]


def test_8bit_states_have_no_packed_form():
    state = eight_bit(nested=True)
    entries = state.as_dict(packed=True)
    assert list(entries) == PLAIN + NESTED
    assert entries["quant_type"] is None and entries["shape"] is None


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.layer.weight."])
def test_dict_round_trip(device, name, packed, prefix):
    state = STATES[name]()
    entries = {prefix + key: value for key, value in state.as_dict(packed=packed).items()}
    if prefix and not (packed and state.quant_type):
        # Only the packed form is recognised under a prefix.
        with pytest.raises(ValueError, match="must hold 'quant_type' or a packed"):
            QuantState.from_dict(entries, device)
        return
    other = QuantState.from_dict(entries, device)
    assert_same(state, other)
    assert all(tensor.device.type == device for tensor in tensors_of(other))
    assert other.shape is None or type(other.shape) is torch.Size
    if state.nested:
        assert other.offset.shape == () and other.offset.dtype == torch.float32
        assert other.state2.shape is None and other.state2.quant_type is None


def test_from_dict_takes_the_packed_entry_out():
    entries = four_bit().as_dict(packed=True)
    QuantState.from_dict(entries, "cpu")
    assert "quant_state.bitsandbytes__nf4" not in entries
    assert entries["quant_type"] == "nf4" and entries["shape"] == [64, 64]


def test_dict_round_trip_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = four_bit(nested=True)
    safetensors.save_file(state.as_dict(packed=True), tmp_path / "state.safetensors")
    entries = safetensors.load_file(tmp_path / "state.safetensors")
    assert_same(QuantState.from_dict(entries, "cpu"), state)


def without(entries, *keys):
    return {key: value for key, value in entries.items() if key not in keys}


def test_from_dict_without_type():
    entries = without(four_bit().as_dict(), "quant_type")
    with pytest.raises(ValueError, match="must hold 'quant_type' or a packed"):
        QuantState.from_dict(entries, "cpu")


def test_from_dict_with_two_packed_entries():
    entries = four_bit().as_dict(packed=True) | four_bit(quant_type="fp4").as_dict(packed=True)
    with pytest.raises(ValueError, match="exactly one packed entry"):
        QuantState.from_dict(entries, "cpu")


def test_from_dict_with_an_unknown_type():
    packed = F.pack_dict_to_tensor({"quant_type": "af4"})
    with pytest.raises(ValueError, match="bitsandbytes__af4"):
        QuantState.from_dict({"quant_state.bitsandbytes__af4": packed}, "cpu")


def test_from_dict_with_an_unknown_entry():
    with pytest.raises(AssertionError, match="surprise"):
        QuantState.from_dict({**four_bit().as_dict(), "surprise": 1}, "cpu")


def test_from_dict_without_shape():
    with pytest.raises(KeyError, match="shape"):
        QuantState.from_dict(without(four_bit().as_dict(), "shape"), "cpu")


@pytest.mark.parametrize("name", ["load", "int8", "nn.Module", ""])
def test_from_dict_dtype_is_one_of_the_known(name):
    with pytest.raises(ValueError, match="dtype must be one of"):
        QuantState.from_dict({**four_bit().as_dict(), "dtype": name}, "cpu")


def test_packing_any_dict():
    entries = {"a": 1, "b": [1.5, None], "c": "\u00fc"}
    packed = F.pack_dict_to_tensor(entries)
    assert packed.dtype == torch.uint8 and packed.dim() == 1
    assert bytes(packed.tolist()) == json.dumps(entries).encode()
    assert F.unpack_tensor_to_dict(packed) == entries


def test_unpacking_from_any_device(device):
    assert F.unpack_tensor_to_dict(F.pack_dict_to_tensor({"a": 1}).to(device)) == {"a": 1}


# --- legacy list form, attributes ---------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_legacy_list(nested):
    state = four_bit(nested=nested)
    fields = list(state)
    assert len(fields) == 6
    absmax, shape, dtype, blocksize, second, quant_type = state
    assert absmax is state.absmax and shape == (64, 64) and dtype == torch.bfloat16
    assert blocksize == 64 and quant_type == "nf4"
    if nested:
        assert second[0] is state.offset and second[1] is state.state2
    else:
        assert second is None
    assert state[-1] == "nf4" and state[1:4] == [shape, dtype, blocksize]
    with pytest.raises(IndexError):
        state[6]
    with pytest.raises(TypeError):
        len(state)


@pytest.mark.parametrize("name", STATES)
def test_from_the_lists_of_old_releases(name):
    state = STATES[name]()
    second = state.state2
    if second is not None:
        second = [second.absmax, second.code, second.blocksize, False, second.dtype, None, None]
    if state.quant_type is None:
        fields = [state.absmax, state.code, 64, state.nested, state.dtype, state.offset, second]
    else:
        nested = [state.offset, second] if state.nested else None
        fields = [state.absmax, [64, 64], state.dtype, 64, nested, state.quant_type, state.code]
    for form in (fields, tuple(fields)):
        assert_same(QuantState.from_list(form), state)
    if state.quant_type is not None:
        today = QuantState.from_list(list(state))
        today.code = state.code  # is not in it
        assert_same(today, state)


def test_from_a_pair():
    absmax, code = torch.ones(2), F.create_dynamic_map()
    state = QuantState.from_list((absmax, code), 64)
    assert state.absmax is absmax and state.code is code
    assert (state.blocksize, state.dtype, state.shape) == (64, None, None)
    assert QuantState.from_list((absmax, code)).blocksize == 4096


def test_from_a_list_of_another_length():
    with pytest.raises(ValueError, match=r"from_list: .* 2, 6 or 7 entries, got 3"):
        QuantState.from_list([1, 2, 3])


def test_packed_form_as_attribute():
    state = four_bit()
    packed = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
    assert torch.equal(state.bitsandbytes__nf4, packed)
    for name in ("bitsandbytes__fp4", "nothing", "__len__"):
        with pytest.raises(AttributeError, match=name):
            getattr(state, name)
    with pytest.raises(AttributeError):
        _ = eight_bit().bitsandbytes__nf4


def test_to_moves_everything_in_place(device):
    for name in STATES:
        state = STATES[name]()
        before = copy.deepcopy(state)
        assert state.to(device) is None
        assert all(tensor.device.type == device for tensor in tensors_of(state))
        assert_same(state, before)


# --- comparison, copies -------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATES)
def test_equal_to_its_copy_only(name):
    state = STATES[name]()
    other = copy.deepcopy(state)
    assert state == other and not state != other
    other.blocksize = 128
    assert state != other
    other = copy.deepcopy(state)
    other.absmax = other.absmax.flip(0) + 1
    assert state != other
    other = copy.deepcopy(state)
    other.dtype = torch.float64
    assert state != other
    other = copy.deepcopy(state)
    other.code = other.code + 1e-3
    assert state != other
    assert state != [1] and state != "state" and (state == None) is False  # noqa: E711


def test_equality_allows_rounding():
    state = four_bit()
    other = copy.deepcopy(state)
    other.absmax = other.absmax + 5e-7
    assert state == other


def test_unequal_instead_of_an_error():
    state, nested = four_bit(), four_bit(nested=True)
    assert state != nested and nested != state
    assert state != QuantState(torch.ones(3), shape=state.shape, code=NF4)
    assert QuantState(torch.ones(1)) == QuantState(torch.ones(1))
    assert QuantState(torch.ones(1)) != QuantState(torch.ones(1), code=NF4)
    other = copy.deepcopy(nested)
    other.offset = other.offset + 1
    assert nested != other
    other = copy.deepcopy(nested)
    other.state2.blocksize = 64
    assert nested != other


def test_unhashable():
    with pytest.raises(TypeError, match="unhashable"):
        hash(eight_bit())


@pytest.mark.parametrize("name", STATES)
def test_copies(name):
    state = STATES[name]()
    shallow, deep = copy.copy(state), copy.deepcopy(state)
    pickled = pickle.loads(pickle.dumps(state))
    for other in (shallow, deep, pickled):
        assert type(other) is QuantState
        assert_same(state, other)
    assert shallow.absmax is state.absmax
    assert deep.absmax.data_ptr() != state.absmax.data_ptr()


def test_survives_torch_save(tmp_path):
    state = eight_bit(nested=True)
    torch.save(state, tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=False), state)
