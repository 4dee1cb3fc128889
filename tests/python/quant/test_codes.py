# SPDX-License-Identifier: MIT
"""The tables of levels: published hashes, their definition, and the native copies."""

import hashlib

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes import _library
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_maps_do_not_depend_on_the_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert sha256(F.create_dynamic_map()) == SIGNED
        assert F.create_linear_map().dtype == torch.float32
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
