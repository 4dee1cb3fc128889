# SPDX-License-Identifier: MIT
"""The tables of levels: published hashes, their definition, and the native copies."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes import _codes4, _library
from bitsandbytes.quant import codes
from bitsandbytes.quant.codes import default_code
from reference import codes as reference

SIGNED = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
UNSIGNED = "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"

PUBLISHED = [
    (F.create_dynamic_map, {}, SIGNED),
    (F.create_dynamic_map, {"signed": False}, UNSIGNED),
    (F.create_dynamic_map, {"max_exponent_bits": 1}, "11e2b218"),
    (F.create_dynamic_map, {"max_exponent_bits": 2}, "d4e54e28"),
    (F.create_dynamic_map, {"max_exponent_bits": 3}, "e6d67f9d"),
    (F.create_dynamic_map, {"max_exponent_bits": 4}, "65835419"),
    (F.create_dynamic_map, {"max_exponent_bits": 5}, "3fca03bc"),
    (F.create_dynamic_map, {"max_exponent_bits": 6}, "289ddc50"),
    (F.create_dynamic_map, {"max_exponent_bits": 8}, SIGNED),
    (
        F.create_linear_map,
        {},
        "80bf4c55fa736fa18f611d26a59e99475bae78388280fbccbf4c7d12437a4775",
    ),
    (
        F.create_linear_map,
        {"add_zero": False},
        "d88eea2f793473b6ba77330cd7ce319ceb4f31aa83ccf5dda7e88b1564de56c1",
    ),
    (
        F.create_linear_map,
        {"signed": False},
        "7cb9ea560989533d101f5082aa194366c6fd5d82a305f2994cc39312a65f7962",
    ),
    (
        F.create_normal_map,
        {},
        "695151d62a023d258f8c1b6d9eb7c67501d612a09af2473b5a046db7cf3436be",
    ),
    (
        F.create_normal_map,
        {"use_extra_value": False},
        "a1dc1a106736730497a824543972384d24dfa942cdfa1829073351e16d2c5568",
    ),
]
PUBLISHED_FP8 = {
    (True, 5, 2): "0da7c4e2990b",
    (True, 4, 3): "f3c007a4cafc",
    (True, 3, 4): "1087860d2249",
    (True, 2, 5): "eb219908101c",
    (True, 1, 6): "a0bae7214cf2",
    (True, 6, 1): "1a59f9be06b2",
    (True, 7, 0): "80befa45053c",
    (False, 5, 3): "81bae5b06de8",
    (False, 4, 4): "421a507fa7f1",
    (False, 3, 5): "acd2afaea69e",
    (False, 2, 6): "222bf5660de8",
    (False, 1, 7): "746dbabd7348",
    (False, 6, 2): "e10f4f2c8df0",
    (False, 7, 1): "f9b0b62a2a37",
}
PUBLISHED += [
    (F.create_fp8_map, {"signed": signed, "exponent_bits": e, "precision_bits": p}, digest)
    for (signed, e, p), digest in PUBLISHED_FP8.items()
]


def sha256(code):
    return hashlib.sha256(code.numpy().astype("<f4").tobytes()).hexdigest()


def assert_table(code):
    assert code.dtype == torch.float32 and code.shape == (256,) and code.device.type == "cpu"


@pytest.mark.parametrize(("create", "arguments", "digest"), PUBLISHED)
def test_map_matches_published_hash(create, arguments, digest):
    code = create(**arguments)
    assert_table(code)
    assert sha256(code).startswith(digest)


def test_maps_take_positional_arguments():
    assert torch.equal(F.create_dynamic_map(True, 3, 8), F.create_dynamic_map(max_exponent_bits=3))
    assert torch.equal(F.create_linear_map(True, 8, False), F.create_linear_map(add_zero=False))


def test_maps_do_not_need_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert F.create_normal_map()[255] == 1


def test_maps_do_not_use_linspace(monkeypatch):
    # Its last bit depends on the processor.
    monkeypatch.delattr(torch, "linspace")
    for create in (F.create_dynamic_map, F.create_linear_map, F.create_normal_map):
        assert create()[255] == 1


def test_levels_of_small_floating_point_formats():
    code = F.create_fp8_map()
    assert code[:2].tolist() == [-1, np.float32(-0.85714287)]
    assert (code[127] == 0) and (code[128] == 0) and code.unique().numel() == 255
    magnitudes = F.create_fp8_map(True, 2, 1, 4).abs().unique()
    sixteenths = [0, 1 / 48, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]
    np.testing.assert_array_equal(magnitudes.numpy(), np.array(sixteenths, np.float32))
    for exponent_bits in range(1, 9):
        wide = F.create_fp8_map(False, exponent_bits, 8 - exponent_bits)
        assert_table(wide)
        assert (wide.diff() >= 0).all() and wide[255] == 1 and wide[0] == 0


@pytest.mark.parametrize("arguments", [(True, 5, 3), (False, 5, 2), (True, 2, 2, 4)])
def test_parts_of_a_floating_point_format_must_add_up(arguments):
    with pytest.raises(AssertionError, match=r"create_fp8_map: .* must be \d .*, got \d \+ \d"):
        F.create_fp8_map(*arguments)


@pytest.mark.parametrize(
    ("create", "arguments"),
    [
        (F.create_dynamic_map, {"total_bits": 0}),
        (F.create_dynamic_map, {"total_bits": 2**40}),
        (F.create_linear_map, {"total_bits": 9}),
        (F.create_linear_map, {"total_bits": -1}),
        (F.create_fp8_map, {"exponent_bits": 2**40, "total_bits": 2**40 + 3}),
        (F.create_fp8_map, {"exponent_bits": -1, "precision_bits": 8}),
        (F.create_fp8_map, {"exponent_bits": 0, "precision_bits": 0, "total_bits": 1}),
        (F.create_normal_map, {"offset": 0.5}),
        (F.create_normal_map, {"offset": 1.0}),
    ],
)
def test_bits_and_offsets_of_no_map(create, arguments):
    with pytest.raises((AssertionError, ValueError), match=rf"^{create.__name__}: .* got "):
        create(**arguments)


def test_normal_map_is_nf4():
    code = F.create_normal_map()
    assert_table(code)
    assert code.unique().numel() == 16 and (code == 0).sum() == 241
    nf4 = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    assert code[:4].tolist() == nf4
    symmetric = F.create_normal_map(use_extra_value=False)
    assert torch.equal(symmetric, -symmetric.flip(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_maps_do_not_depend_on_the_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert sha256(F.create_dynamic_map()) == SIGNED
        for create in (F.create_linear_map, F.create_fp8_map, F.create_normal_map):
            assert create().dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("signed", [True, False])
def test_default_map_matches_recording(golden, signed):
    recorded = golden("quant8")[f"code.dynamic.{'signed' if signed else 'unsigned'}"]
    assert torch.equal(F.create_dynamic_map(signed), recorded)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("less", [0, 1])
def test_few_bit_dynamic_map(bits, less):
    code = F.create_dynamic_map(True, bits - less, bits)
    assert_table(code)
    np.testing.assert_array_equal(code.numpy(), reference.dynamic_map(True, bits - less, bits))
    assert code.unique().numel() == 2**bits
    assert (code == 0).sum() == 256 - 2**bits + 1
    assert (code.diff() >= 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_few_bit_unsigned_dynamic_map(bits):
    code = F.create_dynamic_map(False, bits - 1, bits)
    np.testing.assert_array_equal(code.numpy(), reference.dynamic_map(False, bits - 1, bits))
    assert code.min() == 0 and code.max() == 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("add_zero", [True, False])
def test_linear_map_matches_definition(signed, bits, add_zero):
    code = F.create_linear_map(signed, bits, add_zero)
    assert_table(code)
    np.testing.assert_array_equal(code.numpy(), reference.linear_map(signed, bits, add_zero))


@pytest.mark.parametrize("exponents", [1, 2, 3, 4, 5, 6, 8])
def test_unsigned_map_of_other_exponents_is_refused(exponents):
    with pytest.raises(AssertionError, match=rf"max_exponent_bits={exponents}.* expected 256"):
        F.create_dynamic_map(False, exponents)


def test_exponents_without_cells_add_nothing():
    assert torch.equal(F.create_dynamic_map(True, 2**40), F.create_dynamic_map())
    assert torch.equal(F.create_dynamic_map(True, 7, 4), F.create_dynamic_map(True, 4, 4))


@pytest.mark.parametrize("n", range(1, 8))
def test_legacy_keyword_of_the_signed_map(n):
    assert torch.equal(F.create_dynamic_map(n=n), F.create_dynamic_map(max_exponent_bits=n))


@pytest.mark.parametrize("n", range(1, 8))
def test_legacy_keyword_of_the_unsigned_map(n):
    code = F.create_dynamic_map(signed=False, n=n)
    assert_table(code)
    assert code.unique().numel() == 256 and (code.diff() > 0).all()
    assert code[0] == 0 and code[255] == 1
    if n == 7:
        assert sha256(code) == UNSIGNED
    else:
        # The cells that fill the table lie in the highest decade.
        assert (code >= 0.1).sum() == 2**7 + 2 * (2 ** (7 - n) - 1) + 1


def test_shape_of_the_default_maps():
    signed, unsigned = F.create_dynamic_map(), F.create_dynamic_map(False)
    assert signed[127] == 0 and signed[255] == 1 and unsigned[0] == 0 and unsigned[255] == 1
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    assert (signed.diff() > 0).all() and (unsigned.diff() > 0).all()


@pytest.mark.parametrize("name", ["dynamic", "udynamic"])
def test_native_table_is_the_python_table(name):
    native = _library.native_module()
    if native is None:
        pytest.skip("installed without native code")
    table = np.array(native.code_table(name), np.float32)
    np.testing.assert_array_equal(table, F.create_dynamic_map(name == "dynamic").numpy())
    np.testing.assert_array_equal(table, reference.dynamic_map(name == "dynamic"))


def test_native_table_of_an_unknown_name():
    native = _library.native_module()
    if native is None:
        pytest.skip("installed without native code")
    with pytest.raises(ValueError, match=r"code_table: name must be .* got 'nf5'"):
        native.code_table("nf5")


def test_default_code_is_one_object_per_device(device):
    code = default_code("dynamic", torch.zeros(1, device=device).device)
    assert code.device.type == device
    assert code is default_code("dynamic", code.device)
    assert sha256(code.cpu()) == SIGNED
    assert sha256(default_code("udynamic", code.device).cpu()) == UNSIGNED


def test_name2qmap_is_filled_by_the_first_use():
    F.quantize_blockwise(torch.ones(3))
    assert sha256(F.name2qmap["dynamic"]) == SIGNED
    assert F.name2qmap["dynamic"].device.type == "cpu"


@pytest.fixture
def no_tables(monkeypatch):
    """As in a process that has used no table yet."""
    monkeypatch.setattr(codes, "name2qmap", {})
    monkeypatch.setattr(codes, "_on_device", {})
    monkeypatch.setattr(_codes4, "_cache", {})


def use_tables(device):
    x = torch.randn(8, 64, device=device)
    F.dequantize_blockwise(*F.quantize_blockwise(x))
    packed, state = F.quantize_4bit(x, compress_statistics=True)
    return F.dequantize_4bit(packed, state), state


def test_tables_of_fake_tensors_are_not_shared(device, no_tables):
    for _ in range(2):  # before real ones are there, and after
        with FakeTensorMode():
            out, state = use_tables(device)
        assert isinstance(out, FakeTensor) and isinstance(state.state2.code, FakeTensor)
        assert type(use_tables(device)[0]) is torch.Tensor


def test_tables_first_used_for_inference_serve_training(device, no_tables):
    with torch.inference_mode():
        use_tables(device)
    layer = bnb.nn.LinearNF4(64, 8).to(device)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
