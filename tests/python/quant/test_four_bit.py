# SPDX-License-Identifier: MIT
"""Functions of 4-bit quantization: states, double quantization, outputs, errors, compilation."""

import hashlib

import numpy as np
import pytest
import torch
from quant_inputs import DTYPES, name_of, numpy, public_vector

import bitsandbytes.functional as F
from bitsandbytes._codes4 import STORAGES
from bitsandbytes.functional import QuantState
from reference import codes as codes8
from reference import codes4 as reference

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = ("nf4", "fp4")
QUANTIZE = {"nf4": F.quantize_nf4, "fp4": F.quantize_fp4}
DEQUANTIZE = {"nf4": F.dequantize_nf4, "fp4": F.dequantize_fp4}


def expected(state, packed, blocksize):
    """What codes with these scales mean, in the dtype of the state."""
    values = reference.dequantize(
        state.quant_type,
        numpy(packed).reshape(-1),
        numpy(state.absmax),
        blocksize,
        state.shape.numel(),
        name_of(state.dtype),
    )
    return torch.from_numpy(values).to(state.dtype).view(state.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TYPES)
def test_state_of_a_quantized_tensor(device, dtype, name):
    a = torch.randn(3, 5, 71, device=device).to(dtype)
    packed, state = F.quantize_4bit(a, quant_type=name)
    want, absmax = reference.quantize(name, numpy(a), 64)
    np.testing.assert_array_equal(numpy(packed), want[:, None])
    np.testing.assert_array_equal(numpy(state.absmax), absmax)
    assert (state.blocksize, state.dtype, state.shape) == (64, dtype, a.shape)
    assert (state.quant_type, state.nested) == (name, False)
    assert state.offset is None and state.state2 is None
    np.testing.assert_array_equal(numpy(state.code), reference.levels(name))
    assert packed.device == state.code.device == state.absmax.device == a.device
    values = F.dequantize_4bit(packed, state)
    assert torch.equal(values.cpu(), expected(state, packed, 64))
    assert values.shape == a.shape and values.dtype == dtype


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", TYPES)
def test_named_forms(device, name, blocksize):
    a = torch.randn(70, 70, device=device)
    packed, state = F.quantize_4bit(a, blocksize=blocksize, quant_type=name)
    again, other = QUANTIZE[name](a, blocksize=blocksize)
    assert torch.equal(packed, again) and state == other
    values = F.dequantize_4bit(packed, state)
    assert torch.equal(DEQUANTIZE[name](packed, state), values)
    # The type of the state counts.
    assert torch.equal(F.dequantize_fp4(packed, state), values)
    out = torch.empty_like(a)
    without = DEQUANTIZE[name](packed, absmax=state.absmax, out=out, blocksize=blocksize)
    assert without is out and torch.equal(out, values)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2,), (2, 3, 5), (4, 48), (6, 96)])
@pytest.mark.parametrize("nested", [False, True])
def test_shapes(device, shape, nested):
    a = torch.randn(shape, device=device)
    packed, state = F.quantize_4bit(a, compress_statistics=nested)
    assert packed.shape == ((a.numel() + 1) // 2, 1)
    assert state.shape == shape and F.dequantize_4bit(packed, state).shape == shape


def test_packing_order(device):
    a = torch.tensor([1, -1, 0.5, 0], device=device)
    assert F.quantize_nf4(a)[0].flatten().tolist() == [0xF0, 0xC7]
    assert F.quantize_fp4(a)[0].flatten().tolist() == [0x3B, 0x50]


@pytest.mark.parametrize("storage", STORAGES, ids=name_of)
@pytest.mark.parametrize("n", [5, 64])
@pytest.mark.parametrize("nested", [False, True])
def test_any_storage(device, storage, n, nested):
    a = torch.randn(n, device=device, dtype=torch.float16)
    packed, state = F.quantize_nf4(a, quant_storage=storage, compress_statistics=nested)
    assert packed.dtype == storage
    bytes_, plain = F.quantize_nf4(a, compress_statistics=nested)
    assert state == plain
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(bytes_, plain))


# --- types --------------------------------------------------------------------------------------


PUBLISHED_TYPES = {
    "nf4": "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
    "fp4": "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c",
}


@pytest.mark.parametrize("name", TYPES)
def test_types_match_published_hashes(device, name):
    table = F.get_4bit_type(name, device)
    assert table.dtype == torch.float32 and table.device.type == device
    digest = hashlib.sha256(table.cpu().numpy().tobytes()).hexdigest()
    assert digest == PUBLISHED_TYPES[name]


def test_lookup_types(device):
    af4 = F.get_4bit_type("af4", device)
    assert af4[[0, 7, 8, 15]].tolist() == pytest.approx([1, 0.04273164, 0, -1], abs=1e-8)
    assert (af4.diff() < 0).all()
    int4 = F.get_4bit_type("int4", device) * 7
    assert int4.round().tolist() == [*range(7, -1, -1), *range(0, -8, -1)]
    torch.testing.assert_close(int4, int4.round())


def test_type_is_new_each_time():
    F.get_4bit_type("nf4", "cpu").zero_()
    _, state = F.quantize_nf4(torch.ones(4))
    state.code.zero_()
    np.testing.assert_array_equal(F.get_4bit_type("nf4", "cpu").numpy(), reference.nf4_levels())
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert F.get_4bit_type("nf4").device.type == where


# --- double quantization ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_double_quantization(device, dtype, blocksize):
    a = (torch.randn(300, 401) * torch.rand(300, 1)).to(dtype).to(device)
    packed, state = F.quantize_nf4(a, blocksize=blocksize, compress_statistics=True)
    _, absmax = reference.quantize("nf4", numpy(a), blocksize)
    offset = np.float32(absmax.mean(dtype=np.float64))
    assert state.nested and state.offset.shape == () and state.offset.dtype == torch.float32
    assert state.offset.item() == offset
    dynamic = codes8.dynamic_map(True)
    codes, second = codes8.quantize(dynamic, absmax - offset, 256)
    np.testing.assert_array_equal(numpy(state.absmax), codes)
    np.testing.assert_array_equal(numpy(state.state2.absmax), second)
    np.testing.assert_array_equal(numpy(state.state2.code), dynamic)
    assert (state.state2.blocksize, state.state2.dtype) == (256, torch.float32)
    assert (state.state2.shape, state.state2.quant_type) == (None, None)

    scales = codes8.dequantize(dynamic, codes, second, 256) + offset
    flat = QuantState(torch.from_numpy(scales), a.shape, None, blocksize, "nf4", dtype)
    values = F.dequantize_4bit(packed, state)
    assert torch.equal(values.cpu(), expected(flat, packed, blocksize))
    out = torch.empty_like(values)
    assert F.dequantize_4bit(packed, state, out=out) is out and torch.equal(out, values)


def test_scales_that_are_not_finite_stay_visible(device):
    for bad in (float("nan"), float("inf")):
        a = torch.randn(10_000, device=device)
        a[5000] = bad
        packed, state = F.quantize_nf4(a, compress_statistics=True)
        assert not F.dequantize_4bit(packed, state).isfinite().any()


def test_double_quantization_matches_recording(device, golden):
    recorded = golden("quant4")
    entries = {
        key.removeprefix("nested.state."): value
        for key, value in recorded.items()
        if key.startswith("nested.state.")
    }
    entries["nested_quant_map"] = F.create_dynamic_map()
    whole = QuantState.from_dict(dict(entries), device)
    # The scales of the whole tensor, as if they had been found just now.
    scales = recorded["nested.scales"].to(device)
    a = (scales[:, None] * torch.ones(64, device=device)).flatten()
    _, state = F.quantize_nf4(a, compress_statistics=True)
    assert torch.equal(state.absmax, whole.absmax)
    assert torch.equal(state.state2.absmax, whole.state2.absmax)
    assert state.offset.item() == whole.offset.item()
    # Of elements, the first 64 blocks are recorded here.
    packed, state = F.quantize_nf4(recorded["nested.x"].to(device))
    assert torch.equal(packed.cpu(), recorded["nested.packed"])
    whole.absmax, whole.state2.absmax = whole.absmax[:64], whole.state2.absmax[:1]
    whole.shape = torch.Size([4096])
    assert torch.equal(F.dequantize_4bit(packed, whole).cpu(), recorded["nested.deq"])


# --- arguments ----------------------------------------------------------------------------------


def test_quantize_into_given_tensors(device):
    a = torch.randn(9, 70, device=device)
    want, state = F.quantize_nf4(a)
    out = torch.full_like(want, 7)
    absmax = torch.full_like(state.absmax, 7)
    packed, given = F.quantize_nf4(a, absmax, out)
    assert packed is out and given.absmax is absmax
    assert torch.equal(out, want) and torch.equal(absmax, state.absmax)
    wide = torch.full((315, 2), 7, dtype=torch.uint8, device=device)
    F.quantize_nf4(a, out=wide[:, :1])
    assert torch.equal(wide[:, :1], want) and (wide[:, 1] == 7).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_codes_of_scales_into_a_given_tensor(device, dtype):
    a = torch.randn(9, 70, device=device)
    packed, state = F.quantize_nf4(a, compress_statistics=True)
    absmax = torch.empty(10, dtype=dtype, device=device)
    _, given = F.quantize_nf4(a, absmax, compress_statistics=True)
    assert given.absmax is absmax and torch.equal(absmax, state.absmax.to(dtype))
    assert torch.equal(F.dequantize_4bit(packed, given), F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_into_a_given_tensor(device, dtype):
    packed, state = F.quantize_fp4(torch.randn(9, 71, device=device).to(dtype))
    want = F.dequantize_4bit(packed, state)
    out = torch.full_like(want, 7)
    assert F.dequantize_4bit(packed, state, out=out) is out and torch.equal(out, want)
    wide = torch.full((9, 142), 7, dtype=dtype, device=device)
    F.dequantize_4bit(packed, state, out=wide[:, ::2])
    assert torch.equal(wide[:, ::2], want) and (wide[:, 1::2] == 7).all()


def test_state_wins_over_arguments(device):
    packed, state = F.quantize_nf4(torch.randn(1000, device=device))
    other = torch.zeros(1, device=device)
    values = F.dequantize_4bit(packed, state, other, blocksize=256, quant_type="fp4")
    assert torch.equal(values, F.dequantize_4bit(packed, state))


def test_transposed_codes_give_the_transposed_matrix(device):
    a = torch.randn(6, 10, device=device)
    packed, state = F.quantize_nf4(a)
    values = F.dequantize_4bit(packed, state)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), values.t())
    # One byte is its own transpose, and a vector or a cube has none.
    packed, state = F.quantize_nf4(a[:1, :2])
    assert F.dequantize_4bit(packed, state).shape == (1, 2)
    packed, state = F.quantize_nf4(a.view(3, 2, 10))
    assert F.dequantize_4bit(packed.t(), state).shape == (3, 2, 10)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("length", [6, 7])
def test_legacy_list_as_state(device, nested, length):
    packed, state = F.quantize_nf4(torch.randn(40, 50, device=device), compress_statistics=nested)
    fields = [*state, state.code][:length]
    if nested:
        second = state.state2
        old = [second.absmax, second.code, second.blocksize, False, second.dtype, None, None]
        fields[4] = [state.offset, old]
    assert torch.equal(F.dequantize_4bit(packed, fields), F.dequantize_4bit(packed, state))


# --- acceptance ---------------------------------------------------------------------------------

# Mean and standard deviation of the mean absolute error, and mean relative error, which the public
# package's tests expect of randn(1024, 1024).
ERRORS = {
    ("fp4", 32): (0.088925, 9.1e-5, 0.242443),
    ("fp4", 64): (0.096543, 1.11e-4, 0.260125),
    ("fp4", 128): (0.102969, 1.34e-4, 0.275817),
    ("fp4", 256): (0.108684, 1.82e-4, 0.289831),
    ("fp4", 512): (0.114115, 2.34e-4, 0.302881),
    ("fp4", 1024): (0.119333, 3.2e-4, 0.315000),
    ("fp4", 2048): (0.124556, 4.55e-4, 0.326607),
    ("fp4", 4096): (0.129536, 6.12e-4, 0.337169),
    ("nf4", 32): (0.067746, 6.9e-5, 0.189726),
    ("nf4", 64): (0.072798, 7.4e-5, 0.203339),
    ("nf4", 128): (0.076831, 9.1e-5, 0.215237),
    ("nf4", 256): (0.080337, 1.02e-4, 0.226105),
    ("nf4", 512): (0.083547, 1.43e-4, 0.236079),
    ("nf4", 1024): (0.086610, 1.87e-4, 0.245370),
    ("nf4", 2048): (0.089592, 2.51e-4, 0.254163),
    ("nf4", 4096): (0.092547, 3.6e-4, 0.262473),
}


@pytest.mark.parametrize(("name", "blocksize"), ERRORS)
def test_round_trip_error(device, name, blocksize):
    a = torch.randn(1024, 1024, device=device)
    packed, state = F.quantize_4bit(a, blocksize=blocksize, quant_type=name)
    difference = (F.dequantize_4bit(packed, state) - a).abs()
    mean, deviation, relative = ERRORS[name, blocksize]
    assert abs(difference.mean().item() - mean) < 7 * deviation
    assert (difference / (a.abs() + 1e-8)).mean().item() == pytest.approx(relative, rel=0.02)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_round_trip_error_with_double_quantization(device, name, blocksize):
    a = torch.randn(1024, 1024, device=device)
    packed, state = F.quantize_4bit(a, None, None, blocksize, True, name)
    difference = (F.dequantize_4bit(packed, state) - a).abs()
    assert difference.mean() < 0.11 and (difference / (a.abs() + 1e-8)).mean() < 0.28


PUBLISHED = [
    (
        "nf4",
        64,
        "f74514b5ccc99766923e42f1af504ccbf9a5726538fafd0812ca5602bb130b60",
        "3e42c2692e1e9787c58c1d01e14e2a103b0273ba98bdab72ad1687f2e4c086dc",
    ),
    ("nf4", 128, "704b6e48a757d35548cce2876874ef35f002d198855be4d3adff9452e1baed93", ""),
    ("fp4", 64, "9bf31d082dbd05d4", ""),
]


@pytest.mark.parametrize(("name", "blocksize", "codes", "values"), PUBLISHED)
def test_matches_published_hash(device, name, blocksize, codes, values):
    def digest(tensor):
        return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()

    packed, state = F.quantize_4bit(
        public_vector().to(device), blocksize=blocksize, quant_type=name
    )
    assert digest(packed).startswith(codes)
    assert digest(F.dequantize_4bit(packed, state)).startswith(values)


def test_double_quantization_matches_published_numbers(device):
    _, state = F.quantize_nf4(public_vector().to(device), compress_statistics=True)
    assert state.offset.item() == 0.9679712057113647
    assert state.state2.absmax.tolist() == [0.013869643211364746]


# --- errors -------------------------------------------------------------------------------------

X = torch.randn(130)
PACKED, STATE = F.quantize_nf4(X)


def state_with(**changes):
    state = QuantState(STATE.absmax, X.shape, STATE.code, 64, "nf4", torch.float32)
    for name, value in changes.items():
        setattr(state, name, value)
    return state


BAD_CALLS = [
    ("blocksize", lambda: F.quantize_4bit(X.double(), blocksize=48, quant_type="x")),
    ("quant_type", lambda: F.quantize_4bit(X.double(), quant_type="x")),
    ("A", lambda: F.quantize_4bit(X.double())),
    ("blocksize", lambda: F.quantize_4bit(X, blocksize=0)),
    ("quant_type", lambda: F.quantize_4bit(X, quant_type="af4")),
    ("quant_storage", lambda: F.quantize_4bit(X, quant_storage=torch.bool)),
    ("out", lambda: F.quantize_4bit(X, out=torch.empty(65))),
    ("out", lambda: F.quantize_4bit(X, out=PACKED[:64].clone())),
    ("absmax", lambda: F.quantize_4bit(X, absmax=torch.empty(2))),
    ("quant_state", lambda: F.dequantize_4bit(PACKED)),
    ("quant_state", lambda: F.dequantize_4bit(PACKED, absmax=STATE.absmax)),
    ("quant_state", lambda: F.dequantize_4bit(PACKED, out=X.clone())),
    ("blocksize", lambda: F.dequantize_4bit(PACKED, state_with(blocksize=48))),
    ("quant_type", lambda: F.dequantize_4bit(PACKED, state_with(quant_type="int4"))),
    ("dtype", lambda: F.dequantize_4bit(PACKED, state_with(dtype=torch.float64))),
    ("out", lambda: F.dequantize_4bit(PACKED, STATE, out=torch.empty(130).half())),
    ("out", lambda: F.dequantize_4bit(PACKED, STATE, out=torch.empty(129))),
]


@pytest.mark.parametrize(("argument", "call"), BAD_CALLS)
def test_bad_argument_gets_a_sentence(argument, call):
    with pytest.raises(ValueError, match=rf"^(de)?quantize_4bit: .*\b{argument}\b.*, got "):
        call()


@pytest.mark.parametrize(("name", "blocksize"), [("nf5", 64), ("", 64), ("af4", 128)])
def test_unknown_type(name, blocksize):
    with pytest.raises(NotImplementedError, match=r"^get_4bit_type: .*, got "):
        F.get_4bit_type(name, "cpu", blocksize)


# --- compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_compiles_into_one_graph(device, compile_fresh, nested):
    def round_trip(x):
        packed, state = F.quantize_nf4(x, compress_statistics=nested)
        return F.dequantize_4bit(packed, state) * 2

    compiled = compile_fresh(round_trip, fullgraph=True, backend="aot_eager")
    for n in (64, 700, 701):
        x = torch.randn(n, device=device)
        assert torch.equal(compiled(x), round_trip(x))


def test_compiles_with_a_given_state(device, compile_fresh):
    a = torch.randn(10, 64, device=device)
    packed, state = F.quantize_nf4(a, compress_statistics=True)

    def layer(x):
        return x @ F.dequantize_4bit(packed, state).t()

    x = torch.randn(3, 64, device=device)
    compiled = compile_fresh(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_meta_tensors_have_the_real_shapes():
    ops = torch.ops.bitsandbytes
    a = torch.empty(3, 51, dtype=torch.bfloat16, device="meta")
    packed, absmax = ops.quantize_4bit(a, 64, "nf4", torch.int32)
    assert packed.shape == (20, 1) and packed.dtype == torch.int32 and packed.is_meta
    assert absmax.shape == (3,) and absmax.dtype == torch.float32
    values = ops.dequantize_4bit(packed, absmax, 64, "nf4", [3, 51], torch.float16)
    assert values.shape == (3, 51) and values.dtype == torch.float16
