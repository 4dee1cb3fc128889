# SPDX-License-Identifier: MIT
"""Ops of 4-bit quantization against their specification and against recordings, bit for bit."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quant_inputs import DTYPES, INF, LAYOUTS, NAN, SPECIAL, name_of, numpy, shapes, tensor_of

from bitsandbytes import _codes4, _library
from bitsandbytes.plain import quantize as plain8
from bitsandbytes.plain import quantize_4bit as plain
from reference import codes as codes8
from reference import codes4 as reference

ops = torch.ops.bitsandbytes
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = ("nf4", "fp4")


@pytest.fixture(params=["dispatched", "plain"])
def four_bit(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain if request.param == "plain" else ops


def assert_quantized(result, a, quant_type, blocksize):
    packed, absmax = result
    want, want_absmax = reference.quantize(quant_type, numpy(a), blocksize)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-a.numel() // 2), 1)
    assert absmax.dtype == torch.float32 and absmax.shape == want_absmax.shape
    assert packed.device == a.device == absmax.device
    np.testing.assert_array_equal(numpy(absmax), want_absmax)
    np.testing.assert_array_equal(numpy(packed)[:, 0], want)


def assert_dequantized(values, packed, absmax, quant_type, blocksize, shape, dtype):
    assert values.dtype == dtype and values.shape == shape and values.is_contiguous()
    want = reference.dequantize(
        quant_type,
        numpy(packed).reshape(-1),
        numpy(absmax),
        blocksize,
        values.numel(),
        name_of(dtype),
    )
    got = numpy(values).reshape(-1)
    np.testing.assert_array_equal(got, want)
    zero = want == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


# --- codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_tables_are_those_of_the_native_library(name):
    native = _library.native_module()
    if native is None:
        pytest.skip("no native library")
    np.testing.assert_array_equal(np.float32(native.code_table(name)), reference.levels(name))


@pytest.mark.parametrize("name", TYPES)
def test_tables_are_the_specified_ones(name):
    table = _codes4.levels(name, torch.device("cpu"))
    np.testing.assert_array_equal(table.numpy(), reference.levels(name))
    assert _codes4.levels(name, torch.device("cpu")) is table


def boundary_values(name):
    """Thresholds with two floats to either side, of both signs, and both zeros."""
    if name == "nf4":
        values = codes8.midpoints(reference.nf4_levels())
    else:
        values = reference.FP4_THRESHOLDS
    near = [values]
    for direction in (np.float32(-INF), np.float32(INF)):
        once = np.nextafter(values, direction)
        near += [once, np.nextafter(once, direction)]
    near = np.concatenate([*near, [np.float32(0)]])
    return torch.from_numpy(np.concatenate([near, -near]))


def with_scale_one(values, blocksize):
    """Blocks of the values that begin with 1: they are compared with the thresholds as they are."""
    ones = torch.ones(-(-values.numel() // (blocksize - 1)), 1)
    padded = torch.nn.functional.pad(values, (0, ones.numel() * (blocksize - 1) - values.numel()))
    return torch.cat([ones, padded.view(-1, blocksize - 1)], 1)


@pytest.mark.parametrize("name", TYPES)
def test_every_threshold_and_its_neighbours(four_bit, device, name):
    a = with_scale_one(boundary_values(name), 32).to(device)
    result = four_bit.quantize_4bit(a, 32, name, torch.uint8)
    assert (result[1] == 1).all()
    assert_quantized(result, a, name, 32)


@pytest.mark.parametrize("name", TYPES)
def test_every_threshold_on_every_instruction_set(cpu_isa, name):
    values = boundary_values(name)
    for shift in range(17):  # values land in every lane and in incomplete vectors
        a = with_scale_one(torch.cat([torch.zeros(shift), values]), 64)
        a = a.view(-1)[: a.numel() - shift]
        assert_quantized(ops.quantize_4bit(a, 64, name, torch.uint8), a, name, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TYPES)
def test_all_16_bit_values_of_a_block_of_scale_one(device, dtype, name):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    a = with_scale_one(values[values.abs() <= 1].float(), 256).to(dtype).to(device)
    assert_quantized(ops.quantize_4bit(a, 256, name, torch.uint8), a, name, 256)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    blocksize=st.sampled_from(BLOCKSIZES),
    name=st.sampled_from(TYPES),
    special=st.lists(st.sampled_from(SPECIAL), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_shape_dtype_layout_and_value(
    four_bit, device, shape, dtype, layout, blocksize, name, special, seed
):
    a = tensor_of(shape, dtype, layout, special, seed).to(device)
    packed, absmax = four_bit.quantize_4bit(a, blocksize, name, torch.uint8)
    assert_quantized((packed, absmax), a, name, blocksize)
    values = four_bit.dequantize_4bit(packed, absmax, blocksize, name, shape, dtype)
    assert_dequantized(values, packed, absmax, name, blocksize, shape, dtype)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(0, 5000),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested_blocksize=st.sampled_from([1, 3, 64, 100, 256]),
    name=st.sampled_from(TYPES),
    seed=st.integers(0, 2**16),
)
def test_nested_scales_are_decoded_like_scales(
    four_bit, device, n, dtype, blocksize, nested_blocksize, name, seed
):
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-n // blocksize)
    packed = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    second = torch.randn(-(-blocks // nested_blocksize), generator=generator)
    offset = torch.tensor(0.7)
    code = torch.from_numpy(codes8.dynamic_map(True))
    parts = [t.to(device) for t in (packed, codes, code, second, offset)]
    values = four_bit.dequantize_4bit_nested(*parts, blocksize, nested_blocksize, name, [n], dtype)
    absmax = codes8.dequantize(code, codes.numpy(), second.numpy(), nested_blocksize)
    absmax = torch.from_numpy(absmax + np.float32(0.7))
    assert_dequantized(values, packed, absmax, name, blocksize, (n,), dtype)
    # The same op for codes of 8 bits.
    eight = plain8 if four_bit is plain else ops
    parts = [t.to(device) for t in (packed, codes[: -(-packed.numel() // blocksize)])]
    parts += [t.to(device) for t in (code, second[: -(-parts[1].numel() // nested_blocksize)])]
    values = eight.dequantize_blockwise_nested(
        *parts, offset.to(device), code.to(device), blocksize, nested_blocksize, dtype
    )
    scales = absmax[: parts[1].numel()].numpy()
    want = codes8.dequantize(code, packed.numpy(), scales, blocksize, name_of(dtype))
    np.testing.assert_array_equal(numpy(values), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_blocks(four_bit, device, dtype):
    a = torch.zeros(4, 64)
    a[1, 3] = NAN
    a[1, 4] = 2.0
    a[2, :4] = torch.tensor([INF, -INF, 5.0, -5.0])
    a[3, :4] = torch.tensor([-0.0, 2.0, -2.0, 0.0])
    a = a.to(dtype).to(device)
    decoded = {}
    for name, zero, third, fourth in (
        ("nf4", 0x00, [0x00, 0x77], [0x7F, 0x07]),
        ("fp4", 0x00, [0x00, 0x00], [0x03, 0xB0]),
    ):
        packed, absmax = four_bit.quantize_4bit(a, 64, name, torch.uint8)
        np.testing.assert_array_equal(numpy(absmax), [0, NAN, INF, 2])
        rows = packed.view(4, 32).tolist()
        assert set(rows[0]) == set(rows[1]) == {zero}
        assert rows[2][:2] == third and rows[3][:2] == fourth
        values = four_bit.dequantize_4bit(packed, absmax, 64, name, [4, 64], dtype)
        assert not values[0].any() and values[1].isnan().all()
        assert values[3, :4].tolist() == [0, 2, -2, 0]
        decoded[name] = values.cpu()
    assert (decoded["nf4"][2, :2] == -INF).all() and decoded["nf4"][2, 2:].isnan().all()
    assert decoded["fp4"][2].isnan().all()
    assert decoded["nf4"][0].signbit().all() and not decoded["fp4"][0].signbit().any()


@pytest.mark.parametrize("name", TYPES)
def test_block_without_a_finite_reciprocal(four_bit, device, name):
    # 1 / 1e-39 is infinite in float32: every value but zero goes to an end of the table.
    a = torch.tensor([1e-39, -1e-39, 0.0, 1e-45, -1e-45, 0.0], device=device)
    packed, absmax = four_bit.quantize_4bit(a, 64, name, torch.uint8)
    assert_quantized((packed, absmax), a, name, 64)
    ends = {"nf4": [0xF0, 0x0F, 0x00], "fp4": [0x3B, 0x03, 0xB0]}
    assert packed.flatten().tolist() == ends[name]


@pytest.mark.parametrize("name", TYPES)
def test_missing_last_element_is_a_zero(four_bit, device, name):
    a = torch.tensor([0.0] * 64 + [3.0], device=device)
    packed, _ = four_bit.quantize_4bit(a, 64, name, torch.uint8)
    assert packed[-1].item() == {"nf4": 0xF7, "fp4": 0x30}[name]
    packed, _ = four_bit.quantize_4bit(a * 0, 64, name, torch.uint8)
    assert packed[-1].item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TYPES)
def test_plain_equals_native(device, dtype, name):
    a = (torch.randn(5003, device=device) * 3).to(dtype)
    a[7] = NAN
    a[128:256] = 0
    native, alone = (x.quantize_4bit(a, 128, name, torch.uint8) for x in (ops, plain))
    for one, other in zip(native, alone, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))
    native, alone = (x.dequantize_4bit(*native, 128, name, [5003], dtype) for x in (ops, plain))
    np.testing.assert_array_equal(numpy(native), numpy(alone))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("name", TYPES)
def test_cuda_equals_cpu(device, dtype, blocksize, name):
    if device == "cpu":
        pytest.skip("compares another device with the CPU")
    a = torch.randn(100_003) * torch.randn(100_003).exp2()
    a[:300] = 0
    a = a.to(dtype)
    for first in (0, 1):  # aligned and not
        source = a[first:]
        packed, absmax = ops.quantize_4bit(source, blocksize, name, torch.uint8)
        there = ops.quantize_4bit(a.to(device)[first:], blocksize, name, torch.uint8)
        assert torch.equal(there[0].cpu(), packed) and torch.equal(there[1].cpu(), absmax)
        shape = list(source.shape)
        values = ops.dequantize_4bit(packed, absmax, blocksize, name, shape, dtype)
        back = ops.dequantize_4bit(*there, blocksize, name, shape, dtype)
        assert torch.equal(back.cpu(), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TYPES)
def test_dequantize_every_byte_on_every_instruction_set(cpu_isa, dtype, name):
    packed = torch.arange(256, dtype=torch.uint8).repeat(3)[:-1]
    absmax = torch.tensor([3.3e-7, 70000.0, 1.7, 0.0, INF, NAN, 1e-40, 2.5e38]).repeat(6)
    n = 2 * packed.numel() - 1
    values = ops.dequantize_4bit(packed, absmax, 32, name, [n], dtype)
    assert_dequantized(values, packed, absmax, name, 32, (n,), dtype)


@pytest.mark.parametrize("storage", _codes4.STORAGES, ids=name_of)
@pytest.mark.parametrize("n", [0, 1, 2, 31, 64, 1001])
def test_storage_carries_the_same_bytes(four_bit, device, storage, n):
    a = torch.randn(n, device=device)
    want, absmax = four_bit.quantize_4bit(a, 64, "nf4", torch.uint8)
    packed, again = four_bit.quantize_4bit(a, 64, "nf4", storage)
    assert packed.dtype == storage and torch.equal(again, absmax)
    if -(-n // 2) % storage.itemsize == 0:
        assert packed.shape == ((n + 1) // (2 * storage.itemsize), 1)
    content = packed.view(-1).view(torch.uint8)
    assert content.numel() % storage.itemsize == 0
    assert content.numel() - want.numel() < storage.itemsize
    assert torch.equal(content[: want.numel()], want.view(-1))
    assert not content[want.numel() :].any()
    values = four_bit.dequantize_4bit(packed, absmax, 64, "nf4", [n], torch.float32)
    assert torch.equal(values, four_bit.dequantize_4bit(want, absmax, 64, "nf4", [n], a.dtype))


def test_codes_of_a_filled_up_last_block(four_bit, device):
    # As some devices of the public package make them.
    a = torch.randn(70, device=device)
    packed, absmax = four_bit.quantize_4bit(a, 64, "nf4", torch.uint8)
    longer = torch.cat([packed, packed.new_full((64 - 35, 1), 0x77)])
    values = four_bit.dequantize_4bit(longer, absmax, 64, "nf4", [70], torch.float32)
    assert torch.equal(values, four_bit.dequantize_4bit(packed, absmax, 64, "nf4", [70], a.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_memory_that_vectors_do_not_fit(device, dtype, first):
    n = 20_001  # several turns of a kernel, and a rest
    a = torch.randn(n + first, device=device).to(dtype)[first:]
    packed = torch.full((n // 2 + 1 + first,), 7, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // 128), device=device)
    ops.quantize_4bit.out(a, 128, "nf4", torch.uint8, out=packed[first:], absmax=absmax)
    assert_quantized((packed[first:, None], absmax), a, "nf4", 128)
    values = torch.full((n + first,), 7, dtype=dtype, device=device)
    ops.dequantize_4bit.out(packed[first:], absmax, 128, "nf4", [n], dtype, values[first:])
    assert_dequantized(values[first:], packed[first:], absmax, "nf4", 128, (n,), dtype)
    assert (packed[:first] == 7).all() and (values[:first] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_overloads(four_bit, device, dtype):
    a = torch.randn(10, 71, device=device).to(dtype)
    want, want_absmax = ops.quantize_4bit(a, 64, "fp4", torch.int32)
    packed, absmax = torch.full_like(want, 7), torch.full_like(want_absmax, 7)
    quantize = plain.quantize_4bit_out if four_bit is plain else ops.quantize_4bit.out
    dequantize = plain.dequantize_4bit_out if four_bit is plain else ops.dequantize_4bit.out
    assert quantize(a, 64, "fp4", torch.int32, out=packed, absmax=absmax) is None
    assert torch.equal(packed, want) and torch.equal(absmax, want_absmax)
    values = torch.empty_like(a)
    assert dequantize(packed, absmax, 64, "fp4", [10, 71], dtype, values) is None
    assert torch.equal(values, ops.dequantize_4bit(packed, absmax, 64, "fp4", [10, 71], dtype))


# --- errors -------------------------------------------------------------------------------------

X = torch.randn(130)
U8 = torch.zeros(65, dtype=torch.uint8)
SCALES, CODES, CODE = torch.ones(3), torch.zeros(3, dtype=torch.uint8), torch.ones(256)
ONE = torch.ones(())
F32 = torch.float32
TAIL = (64, 256, "nf4", [130], F32)
BAD_OPS = [
    ("quantize_4bit", "A", (X.double(), 64, "nf4", torch.uint8)),
    ("quantize_4bit", "blocksize", (X, 48, "nf4", torch.uint8)),
    ("quantize_4bit", "blocksize", (X, 16, "nf4", torch.uint8)),
    ("quantize_4bit", "blocksize", (X, 8192, "nf4", torch.uint8)),
    ("quantize_4bit", "blocksize", (X, -64, "nf4", torch.uint8)),
    ("quantize_4bit", "quant_type", (X, 64, "af4", torch.uint8)),
    ("quantize_4bit", "quant_storage", (X, 64, "nf4", torch.bool)),
    ("quantize_4bit", "quant_storage", (X, 64, "nf4", torch.complex64)),
    ("quantize_4bit.out", "out", (X, 64, "nf4", torch.uint8, U8.float(), SCALES.clone())),
    ("quantize_4bit.out", "out", (X, 64, "nf4", torch.uint8, U8[1:].clone(), SCALES.clone())),
    ("quantize_4bit.out", "absmax", (X, 64, "nf4", torch.uint8, U8.clone(), SCALES.double())),
    ("quantize_4bit.out", "absmax", (X, 64, "nf4", torch.uint8, U8.clone(), SCALES[1:].clone())),
    ("dequantize_4bit", "A", (U8[1:], SCALES, 64, "nf4", [130], F32)),
    ("dequantize_4bit", "A", (torch.zeros(97), SCALES, 64, "nf4", [130], F32)),
    ("dequantize_4bit", "A", (U8.bool(), SCALES, 64, "nf4", [130], F32)),
    ("dequantize_4bit", "absmax", (U8, SCALES[1:], 64, "nf4", [130], F32)),
    ("dequantize_4bit", "absmax", (U8, SCALES.half(), 64, "nf4", [130], F32)),
    ("dequantize_4bit", "blocksize", (U8, SCALES, 63, "nf4", [130], F32)),
    ("dequantize_4bit", "quant_type", (U8, SCALES, 64, "nf5", [130], F32)),
    ("dequantize_4bit", "shape", (U8, SCALES, 64, "nf4", [-1, 130], F32)),
    ("dequantize_4bit", "dtype", (U8, SCALES, 64, "nf4", [130], torch.float64)),
    ("dequantize_4bit.out", "out", (U8, SCALES, 64, "nf4", [130], torch.half, X.clone())),
    ("dequantize_4bit.out", "out", (U8, SCALES, 64, "nf4", [130], F32, X[1:].clone())),
    ("dequantize_4bit_nested", "absmax_8bit", (U8, SCALES, CODE, SCALES[:1], ONE, *TAIL)),
    ("dequantize_4bit_nested", "absmax_8bit", (U8, CODES[1:], CODE, SCALES[:1], ONE, *TAIL)),
    ("dequantize_4bit_nested", "absmax_code", (U8, CODES, CODE[1:], SCALES[:1], ONE, *TAIL)),
    ("dequantize_4bit_nested", "absmax", (U8, CODES, CODE, SCALES, ONE, *TAIL)),
    ("dequantize_4bit_nested", "absmax_offset", (U8, CODES, CODE, SCALES[:1], SCALES, *TAIL)),
    (
        "dequantize_4bit_nested",
        "nested_blocksize",
        (U8, CODES, CODE, SCALES, ONE, 64, 0, "nf4", [130], F32),
    ),
]


@pytest.mark.parametrize(("name", "argument", "args"), BAD_OPS)
def test_bad_argument_of_an_op_gets_a_sentence(four_bit, device, name, argument, args):
    op, _, overload = name.partition(".")
    if four_bit is plain:
        call = getattr(plain, name.replace(".", "_"))
    else:
        call = getattr(getattr(ops, op), overload or "default")
    args = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    before = [arg.clone() for arg in args if isinstance(arg, torch.Tensor)]
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    keywords = {}
    if name == "quantize_4bit.out":
        *args, out, absmax = args
        keywords = {"out": out, "absmax": absmax}
    # Native kernels raise RuntimeError, the plain ones ValueError.
    with pytest.raises((ValueError, RuntimeError), match=rf"^{op}: .*\b{argument} .*, got "):
        call(*args, **keywords)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


# --- recordings ---------------------------------------------------------------------------------


def digest(tensor):
    """SHA-256 of a tensor's bytes, with one kind of NaN."""
    tensor = tensor.cpu()
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), NAN, tensor)
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).digest()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("distribution", ["normal", "lognormal", "uniform", "edge"])
def test_matches_recording(device, golden, distribution, dtype, name):
    a = golden("quant8")[f"{distribution}.x"].to(dtype).to(device)
    recorded = golden("quant4")
    for blocksize in (64, 128, 4096):
        prefix = f"{distribution}.{name_of(dtype)}.{name}.{blocksize}"
        packed, absmax = ops.quantize_4bit(a, blocksize, name, torch.uint8)
        assert digest(packed) == bytes(recorded[f"{prefix}.packed.sha256"])
        assert digest(absmax) == bytes(recorded[f"{prefix}.absmax.sha256"])
        if blocksize == 64:
            values = ops.dequantize_4bit(packed, absmax, 64, name, list(a.shape), dtype)
            assert digest(values) == bytes(recorded[f"{prefix}.deq.sha256"])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_matches_recording_on_every_instruction_set(cpu_isa, golden, dtype):
    for name in TYPES:
        for distribution in ("normal", "lognormal", "uniform", "edge"):
            test_matches_recording("cpu", golden, distribution, dtype, name)
