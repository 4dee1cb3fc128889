# SPDX-License-Identifier: MIT
"""What docs/numerics.md says of quantization: each rule, quoted beside the test of what it says."""

import math
import random

import numpy as np
import pytest
import torch
from numerics_page import Rules

import bitsandbytes as bnb
import bitsandbytes.functional as F
from reference import codes as reference
from reference import codes4 as reference4

ops = torch.ops.bitsandbytes
f32 = np.float32
INF, NAN = float("inf"), float("nan")
BLOCK = 64
SIGNED, UNSIGNED = reference.dynamic_map(True), reference.dynamic_map(False)

rule = Rules("8-bit blockwise codes", "Adam and AdamW")


def test_every_rule_has_a_test_and_every_test_a_rule():
    rule.assert_tested()
    rule.assert_marked("Special values", "int8")


@pytest.mark.parametrize("name", rule.names)
def test_page_has_the_words_that_are_tested(name):
    rule.assert_quoted(name)


# --- helpers --------------------------------------------------------------------------------------


def tensor(values, device, dtype=torch.float32):
    return torch.from_numpy(np.array(values, f32)).to(device, dtype)


def array(t):
    return t.detach().cpu().numpy()


def quantized(values, device, code=SIGNED):
    """Codes, scales and decoded numbers of one call with blocks of 64."""
    codes, state = F.quantize_blockwise(
        tensor(values, device), code=tensor(code, device), blocksize=BLOCK
    )
    return array(codes), array(state.absmax), array(F.dequantize_blockwise(codes, state))


def quantized4(values, device, name):
    packed, state = F.quantize_4bit(tensor(values, device), quant_type=name, blocksize=BLOCK)
    codes = reference4.unpack(array(packed).reshape(-1), len(values))
    return codes, array(state.absmax), array(F.dequantize_4bit(packed, state))


def in_blocks_of_absmax_1(s):
    """The numbers, of magnitudes up to 1, each block of 64 with a leading 1; and their places."""
    s = np.asarray(s, f32)
    rows = np.pad(s, (0, -s.size % (BLOCK - 1))).reshape(-1, BLOCK - 1)
    blocks = np.concatenate([np.ones((len(rows), 1), f32), rows], 1)
    places = np.arange(blocks.size).reshape(blocks.shape)[:, 1:].reshape(-1)[: s.size]
    return blocks.reshape(-1), places


def codes_of(s, device, code=SIGNED):
    """Codes of scaled values."""
    blocks, places = in_blocks_of_absmax_1(s)
    return quantized(blocks, device, code)[0][places]


def codes4_of(s, device, name):
    blocks, places = in_blocks_of_absmax_1(s)
    return quantized4(blocks, device, name)[0][places]


def around(values):
    """The numbers and the floats on either side."""
    values = np.asarray(values, f32)
    return [np.nextafter(values, f32(-INF)), values, np.nextafter(values, f32(INF))]


def product_below_quotient():
    """Floats x < m for which x * (1 / m) is the float before x / m; and the product."""
    generator = np.random.default_rng(0)
    x, m = generator.uniform(0.33, 0.42, 1000).astype(f32), generator.uniform(1, 1.1, 1000)
    m = m.astype(f32)
    product = x * (f32(1) / m)
    found = (np.nextafter(product, f32(1)) == x / m) & (product > 0.3) & (product < 0.4)
    assert found.any()
    i = int(np.argmax(found))
    return x[i], m[i], product[i]


# --- 8-bit blockwise codes ------------------------------------------------------------------------


@rule(
    "blocks",
    "A tensor is cut into blocks of consecutive elements in row-major order; the last block may "
    "be short.",
    "absmax = max |x| over the block",
    "x' = level[code] * absmax one product, one rounding to the dtype asked for",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks(device, dtype):
    a = torch.randn(30, 7).to(dtype).t()  # row-major order is not that of the memory
    codes, state = F.quantize_blockwise(a.to(device), blocksize=BLOCK)
    flat = array(a.float().reshape(-1))
    scales = [np.abs(flat[i : i + BLOCK]).max() for i in range(0, 210, BLOCK)]
    np.testing.assert_array_equal(array(state.absmax), scales)
    values = F.dequantize_blockwise(codes, state)
    want = SIGNED[array(codes).reshape(-1)] * np.repeat(array(state.absmax), BLOCK)[:210]
    assert torch.equal(values.cpu(), torch.from_numpy(want).to(dtype).view(7, 30))


@rule("blocks", "s = x * (1 / absmax) one rounded reciprocal per block, one rounded product")
def test_scaled_values_are_products(device):
    x, m, product = product_below_quotient()
    # The threshold of these two levels is the float behind the product, which the quotient is.
    code = [product - f32(0.0625), product + f32(0.0625)]
    codes, _, _ = quantized([m, x], device, code)
    assert codes.tolist() == [1, 0]


@rule(
    "dynamic-map",
    "has seven decades of levels, each with twice as many as the one below it: the midpoints of "
    "1, 2, 4 ... 64 equal cells of [0.1, 1], times 1e-6 ... 1.",
    "0 (code 127) and 1 (code 255), 256 levels in all; -1 is not one of them, and the lowest "
    "level is -0.99297.",
    "The unsigned map holds 2, 4 ... 128 midpoints, 0 (code 0) and 1 (code 255).",
)
def test_dynamic_map():
    for signed, zero in ((True, 127), (False, 0)):
        levels = []
        for decade in range(7):
            edges = np.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1)
            levels += list((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
        levels = [*levels, *(-x for x in levels if signed), 0, 1]
        got = F.create_dynamic_map(signed).numpy()
        np.testing.assert_allclose(got, sorted(levels), rtol=1e-6)
        assert got.size == 256 and got[zero] == 0 and got[255] == 1
    assert abs(F.create_dynamic_map()[0] + 0.99297) < 1e-5


@rule(
    "dynamic-map-bits",
    "The tables are fixed to the last bit: they are computed as `torch.linspace` computes them on "
    "a processor with fused multiply-add, and hold on every processor.",
)
def test_bits_of_dynamic_map():
    np.testing.assert_array_equal(F.create_dynamic_map(True).numpy(), SIGNED)
    np.testing.assert_array_equal(F.create_dynamic_map(False).numpy(), UNSIGNED)


@rule(
    "own-tables",
    "Any other f32 table of 1 to 256 levels can be given as `code`.",
    "A table that is not ascending is put in order first, equal levels in the order of their "
    "codes, and results are codes of the table as it was given",
    "A level that is NaN is never taken, and a code beyond the end of a short table decodes as "
    "NaN.",
)
def test_own_tables(device):
    table = [1, -1, 0.5, NAN, 0.5]  # in order: codes 1, 2, 4, 0
    codes, _, values = quantized([1, -1, 0.6, 0.5, -0.2], device, table)
    # 0.5 is the midpoint of both 0.5s: places 1 and 2 of the order, of which 2 is even.
    assert codes.tolist() == [0, 1, 4, 4, 2 if f32(-0.2) >= f32(-0.25) else 1]
    assert values.tolist() == [1, -1, 0.5, 0.5, 0.5]
    assert not quantized([-3, 0, 2], device, [0.25])[0].any()
    beyond = torch.tensor([4, 5, 255], dtype=torch.uint8, device=device)
    one = torch.ones(1, device=device)
    values = F.dequantize_blockwise(beyond, absmax=one, code=tensor(table, device), blocksize=64)
    np.testing.assert_array_equal(array(values), [0.5, NAN, NAN])


@rule(
    "other-maps",
    "The *linear* map has equally spaced levels.",
    "The *fp8* maps are all numbers of a small floating-point format over the largest of them.",
    "The *normal* map has the 16 levels of NF4, whose quantiles of the normal distribution are "
    "computed in float64.",
    "The *quantile* map of a tensor has 255 of its quantiles and 0, over the greatest magnitude.",
)
def test_other_maps(device):
    for signed in (True, False):
        linear = F.create_linear_map(signed).numpy()
        np.testing.assert_array_equal(linear, reference.linear_map(signed))
        # The signed map has a zero more, in the middle.
        spaces = np.diff(np.delete(linear, 127)) * 127 if signed else np.diff(linear) * 255
        np.testing.assert_allclose(spaces, 1, rtol=1e-4)
    numbers = [i / 4 * 2.0**-16 for i in range(4)]
    numbers += [(1 + i / 4) * 2.0**e for e in range(-14, 17) for i in range(4)]
    numbers = np.array(sorted([*numbers, *(-x for x in numbers)])) / max(numbers)
    np.testing.assert_array_equal(F.create_fp8_map().numpy(), numbers.astype(f32))
    normal = F.create_normal_map().unique()
    np.testing.assert_array_equal(normal.numpy(), reference4.nf4_levels())
    a = torch.randn(1000, device=device)
    quantiles = array(F.estimate_quantiles(a, num_quantiles=255))
    levels = np.sort(np.append(quantiles, f32(0)))
    got = array(F.create_quantile_map(a))
    np.testing.assert_array_equal(got, levels / np.abs(levels).max())


@rule(
    "decision",
    "Threshold k, between codes k and k + 1, is the f32 midpoint `(level[k] + level[k+1]) * 0.5`.",
    "The code of s is the number of thresholds that s has reached.",
    "An s exactly on a midpoint takes the even code: where k is even the threshold is the next "
    "float above the midpoint.",
)
def test_decision(device):
    # Midpoints of these levels are floats, and no f32 is nearer to one of two neighbours.
    even = np.arange(256) / 128 - 1
    k = np.arange(255)
    below, on, above = (codes_of(s, device, even) for s in around((k + 0.5) / 128 - 1))
    np.testing.assert_array_equal(below, k)
    np.testing.assert_array_equal(on, k + k % 2)
    np.testing.assert_array_equal(above, k + 1)
    # The levels of any other table too.
    levels = np.sort(np.random.default_rng(1).uniform(-1, 1, 256)).astype(f32)
    midpoints = (levels[:-1] + levels[1:]) * f32(0.5)
    thresholds = np.where(k % 2 == 0, np.nextafter(midpoints, f32(INF)), midpoints)
    s = np.concatenate([*around(midpoints), np.linspace(-1, 1, 999, dtype=f32)])
    want = (s[:, None] >= thresholds).sum(1)
    np.testing.assert_array_equal(codes_of(s, device, levels), want)


@rule("one-code", "All ways give the same code for every s.")
@pytest.mark.parametrize("table", [SIGNED, UNSIGNED])
def test_one_code(device, table):
    s = np.concatenate(
        [
            *around((table[:-1] + table[1:]) * f32(0.5)),
            *(sign * np.geomspace(1e-8, 1, 2001, dtype=f32) for sign in (1, -1)),
        ]
    )
    s = s[np.abs(s) <= 1]
    order = np.random.default_rng(2).permutation(256)
    searched = codes_of(s, device, table[order])
    np.testing.assert_array_equal(order[searched], codes_of(s, device, table))


@rule(
    "error-8bit",
    "The error of a decoded number is at most half a gap between levels.",
    "In the top decade that is 0.71 % of absmax (signed) or 0.36 % (unsigned)",
    "Everything below 2.75e-7 absmax (signed) or 1.6e-7 absmax (unsigned) becomes 0.",
)
def test_error(device):
    for table, bound, dead in ((SIGNED, 0.0071, 2.74e-7), (UNSIGNED, 0.0036, 1.6e-7)):
        s = np.linspace(max(table[0], -1), 1, 63 * 500, dtype=f32)
        codes = codes_of(s, device, table)
        upper = np.clip(np.searchsorted(table, s), 1, 255)
        error = np.abs(table[codes] - s)
        assert (error <= (table[upper] - table[upper - 1]) / 2 + 1e-7).all()
        assert 0.97 * bound < error[np.abs(s) >= 0.1].max() < bound
        zero = int(np.flatnonzero(table == 0)[0])
        assert codes_of([dead, 1.04 * dead], device, table).tolist() == [zero, zero + 1]


@rule(
    "stochastic",
    "With c the nearest level to s, d its neighbour on the other side of s, and r the element's "
    "random number, uniform in [0, 1): code = d if r >= (d - s) / (d - c), else c",
    "so that the mean of the levels is s.",
    "Beyond the ends of the table there is no d: s < -0.99297 takes the lowest level of the signed "
    "map.",
)
def test_stochastic_rounding(device):
    a = tensor([1, 0.25, 0.25, 0.25], device)  # c = 0, d = 1: (d - s) / (d - c) = 0.75
    rand = tensor([0, 0.7499, 0.75, 0.7501], device)
    codes, _ = ops.quantize_blockwise_stochastic(a, tensor([0, 1], device), BLOCK, rand, 0)
    assert codes.tolist() == [1, 0, 1, 1]
    rand = (torch.arange(1024, device=device) + 0.5) / 1024
    a = torch.full((1024,), 0.25, device=device)
    a[::BLOCK] = 1
    code = tensor([-1, 0, 1], device)
    codes, _ = ops.quantize_blockwise_stochastic(a, code, BLOCK, rand, 0)
    quarter = (codes[a == 0.25].float() - 1).mean().item()
    assert abs(quarter - 0.25) < 0.02
    rand = torch.full((1024,), 0.9999, device=device)
    a = tensor([1, -0.995, -1], device)
    codes, _ = ops.quantize_blockwise_stochastic(a, tensor(SIGNED, device), BLOCK, rand, 0)
    assert codes.tolist() == [255, 0, 0]


@rule(
    "stochastic-order",
    "Element i takes number `(i + start) mod m` of the m in `rand`, where start is one number of "
    "Python's `random` below 1024 (0 in compiled code).",
    "Scales are those of rounding to the nearest.",
)
def test_order_of_random_numbers(device):
    a = torch.full((300,), 0.5, device=device)
    a[::BLOCK] = 1
    code = tensor([0, 1], device)
    rand = torch.rand(7, device=device)
    codes, absmax = ops.quantize_blockwise_stochastic(a, code, BLOCK, rand, 3)
    taken = array(rand)[(np.arange(300) + 3) % 7]
    np.testing.assert_array_equal(array(codes), (taken >= 0.5) | (np.arange(300) % BLOCK == 0))
    assert torch.equal(absmax, F.quantize_blockwise(a, blocksize=BLOCK)[1].absmax)
    rand = torch.rand(1500, device=device)
    random.seed(5)
    got, _ = F.quantize_blockwise(a, code, blocksize=BLOCK, rand=rand)
    random.seed(5)
    start = random.randrange(1024)
    want, _ = ops.quantize_blockwise_stochastic(a, code, BLOCK, rand, start)
    assert start > 0 and torch.equal(got, want)


@rule("zero", "element 0 or -0, absmax > 0 | | that of 0 | 0 |")
def test_zero(device):
    for table, zero in ((SIGNED, 127), (UNSIGNED, 0)):
        codes, _, values = quantized([0.0, 5.0, -0.0], device, table)
        assert codes.tolist() == [zero, 255, zero] and values.tolist() == [0, 5, 0]


@rule(
    "zeros",
    "only zeros | 0 | 0 (0 * inf is NaN, which takes code 0) | -0 (signed map), 0 (unsigned) |",
)
def test_zeros(device):
    for table, negative in ((SIGNED, True), (UNSIGNED, False)):
        codes, absmax, values = quantized([0.0, -0.0] * 50, device, table)  # one block is short
        assert not codes.any() and absmax.tolist() == [0, 0]
        assert not values.any() and (np.signbit(values) == negative).all()


@rule("nan", "a NaN among the elements | NaN | 0 | NaN, the whole block |")
def test_nan(device):
    for nan in (NAN, -NAN):
        codes, absmax, values = quantized([1, nan, INF, 0], device)
        assert np.isnan(absmax).all() and not codes.any() and np.isnan(values).all()


@rule(
    "infinity",
    "an infinity, no NaN | infinity | 0 for the infinities, that of 0 for the others | signed map: "
    "-infinity for the infinities, NaN for the others; unsigned: NaN |",
)
def test_infinity(device):
    codes, absmax, values = quantized([INF, 3, -INF, 0], device)
    assert codes.tolist() == [0, 127, 0, 127] and absmax.tolist() == [INF]
    np.testing.assert_array_equal(values, [-INF, NAN, -INF, NAN])
    codes, absmax, values = quantized([INF, 3, -INF, 0], device, UNSIGNED)
    assert not codes.any() and absmax.tolist() == [INF] and np.isnan(values).all()


@rule(
    "overflow",
    "1 / absmax overflows (absmax < 2.94e-39) | as it is | lowest or highest code by sign, 0 for "
    "zeros | within absmax of the input |",
)
def test_overflow_of_the_reciprocal(device):
    for most in (2.93e-39, 1e-45):
        a = np.array([most, -most, most / 2, 0], f32)
        codes, absmax, values = quantized(a, device)
        assert absmax.tolist() == [a[0]]
        assert codes.tolist() == [255, 0, 255 if a[2] > 0 else 0, 0]
        assert (np.abs(values.astype(np.float64) - a) <= a[0]).all()
    assert quantized([2.95e-39, 1e-44], device)[0].tolist() == [255, 129]


@rule("negative-unsigned", "negative elements, unsigned map | counted by magnitude | 0 | 0 |")
def test_negative_elements_and_unsigned_map(device):
    codes, absmax, values = quantized([-4, 2, -1e-9], device, UNSIGNED)
    assert absmax.tolist() == [4] and codes[[0, 2]].tolist() == [0, 0] and codes[1] > 0
    assert values[[0, 2]].tolist() == [0, 0]


@rule(
    "lost-blocks",
    "A block that held NaN or infinity is thus lost, and visibly so; its neighbours are not "
    "touched.",
)
def test_lost_blocks(device):
    a = np.random.default_rng(3).standard_normal(3 * BLOCK).astype(f32)
    clean = quantized(a, device)[2]
    for bad in (NAN, INF, -INF):
        a[BLOCK + 5] = bad
        values = quantized(a, device)[2].reshape(3, BLOCK)
        assert not np.isfinite(values[1]).any()
        np.testing.assert_array_equal(values[[0, 2]], clean.reshape(3, BLOCK)[[0, 2]])


@rule("subnormal", "`absmax` never flushes subnormal numbers to zero.")
def test_subnormal_scales(device):
    assert quantized([1e-45, 0], device)[1].tolist() == [f32(1e-45)]
    half = torch.tensor([6e-8, 0], dtype=torch.float16, device=device)
    _, state = F.quantize_blockwise(half, blocksize=BLOCK)
    assert state.absmax.tolist() == [2.0**-24]
    for name in ("nf4", "fp4"):
        assert quantized4([1e-45, 0], device, name)[1].tolist() == [f32(1e-45)]


# --- quantized scales -----------------------------------------------------------------------------


def nested_states(a):
    """Of both ways: the scales, and the state that holds them quantized."""
    _, plain = F.quantize_blockwise(a, blocksize=BLOCK)
    _, nested = F.quantize_blockwise(a, blocksize=BLOCK, nested=True)
    yield plain.absmax, nested, BLOCK
    _, plain = F.quantize_4bit(a, quant_type="nf4")
    _, nested = F.quantize_4bit(a, quant_type="nf4", compress_statistics=True)
    yield plain.absmax, nested, 256


@rule(
    "nested",
    "the scales are quantized themselves, with the signed dynamic map:",
    "offset = mean of absmax a sum in float64, rounded once to f32; 0 of no scales",
    "codes = those of absmax - offset",
    "absmax' = level[code] * absmax2 + offset two roundings",
)
def test_nested_scales(device):
    a = torch.randn(300 * BLOCK, device=device)
    for scales, state, blocksize in nested_states(a):
        offset = f32(array(scales).astype(np.float64).sum() / scales.numel())
        assert state.offset.item() == offset
        codes, absmax = reference.quantize(SIGNED, array(scales) - offset, blocksize)
        np.testing.assert_array_equal(array(state.absmax), codes)
        np.testing.assert_array_equal(array(state.state2.absmax), absmax)
        decoded = SIGNED[codes] * np.repeat(absmax, blocksize)[: codes.size] + offset
        assert decoded.dtype == f32
        # A block of one code that is worth 1, or -1, shows its scale.
        if state.quant_type is None:
            ones = torch.full((a.numel(),), 255, dtype=torch.uint8, device=device)
            values = F.dequantize_blockwise(ones, state)
        else:
            ones = torch.full((a.numel() // 2, 1), 255, dtype=torch.uint8, device=device)
            values = F.dequantize_4bit(ones, state)
        np.testing.assert_array_equal(array(values), np.repeat(decoded, BLOCK))
    for _, state, _ in nested_states(a[:0]):
        assert state.offset.item() == 0


@rule(
    "nested-order",
    "The sum is exact as long as the largest scale is less than 2^29 / n times the smallest of n, "
    "so that its order does not matter.",
)
def test_order_of_the_scales_does_not_matter(device):
    generator = torch.Generator().manual_seed(4)
    n = 1000
    scales = torch.rand(n, generator=generator) * 2.0**18 + 1  # less than 2^29 / n apart
    for _ in range(3):
        scales = scales[torch.randperm(n, generator=generator)]
        a = scales.to(device).repeat_interleave(BLOCK)
        _, state = F.quantize_nf4(a, compress_statistics=True)
        assert state.offset.item() == f32(math.fsum(scales.tolist()) / n)


@rule(
    "nested-decode",
    "Scales are decoded inside the kernel, with the same bits as `dequantize_blockwise` and an "
    "addition give.",
    "A scale that is NaN or infinite makes the offset so, and the whole tensor NaN.",
)
def test_decoding_of_nested_scales(device):
    a = torch.randn(300 * BLOCK, device=device)
    codes, state = F.quantize_blockwise(a, blocksize=BLOCK, nested=True)
    scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    want = ops.dequantize_blockwise(codes, scales, state.code, BLOCK, torch.float32)
    assert torch.equal(F.dequantize_blockwise(codes, state), want)
    for bad in (NAN, INF):
        a[7] = bad
        codes, state = F.quantize_blockwise(a, blocksize=BLOCK, nested=True)
        assert not state.offset.isfinite()
        assert F.dequantize_blockwise(codes, state).isnan().all()
        packed, state = F.quantize_nf4(a, compress_statistics=True)
        assert not state.offset.isfinite()
        assert F.dequantize_4bit(packed, state).isnan().all()


# --- one scale, or none; optimizer states ---------------------------------------------------------


@rule(
    "whole-tensor",
    "`quantize` takes the whole tensor as a block, but divides: `s = x / absmax`, one rounded "
    "division.",
)
def test_whole_tensor(device):
    x, m, product = product_below_quotient()
    code = [product - f32(0.0625), product + f32(0.0625)]
    codes, (absmax, _) = F.quantize(tensor([m, x], device), tensor(code, device))
    assert absmax.item() == m and codes.tolist() == [1, 1]
    _, (absmax, _) = F.quantize(torch.arange(5000, device=device).float())
    assert absmax.item() == 4999


@rule(
    "no-absmax",
    "`quantize_no_absmax` takes `s = x`: numbers beyond the table get its lowest or highest level, "
    "NaN gets code 0. `dequantize_no_absmax` is `level[code]`.",
)
def test_no_absmax(device):
    code = tensor(SIGNED, device)
    codes = F.quantize_no_absmax(tensor([5, -5, INF, NAN, SIGNED[200], 0], device), code)
    assert codes.tolist() == [255, 0, 255, 0, 200, 127]
    every = torch.arange(256, dtype=torch.uint8, device=device)
    assert torch.equal(F.dequantize_no_absmax(every, code), code)


@rule(
    "signs-of-states",
    "The same codes in blocks of 256, the signed map for the first state and the unsigned one for "
    "the second",
    "a negative value (-0 too) never becomes 0, it takes the smallest negative level.",
)
def test_signs_of_states(device):
    p = torch.nn.Parameter(torch.zeros(4096, device=device))
    p.grad = torch.full((4096,), -1e-9, device=device)
    p.grad[::256] = 1  # absmax of each block
    p.grad[1:4] = tensor([-0.0, 0.0, 1e-9], device)
    optimizer = bnb.optim.SGD8bit([p], lr=1e-3, momentum=0.9)
    optimizer.step()  # the state is the gradient
    codes = optimizer.state[p]["state1"]
    assert codes[:5].tolist() == [255, 126, 127, 127, 126]
    assert (codes.view(-1, 256)[:, 5:] == 126).all()


# --- 4-bit blockwise codes ------------------------------------------------------------------------


@rule(
    "blocks-4bit",
    "Blocks, absmax, reciprocal and product are those of 8-bit codes; blocks have 32, 64 ... 4096 "
    "elements.",
    "code = by the thresholds that s exceeds (s > threshold)",
    "x' = level[code] * absmax one product, one rounding to the dtype asked for",
)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_blocks_of_4bit_codes(device, name):
    a = torch.randn(9000, device=device)
    for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        packed, state = F.quantize_4bit(a, blocksize=blocksize, quant_type=name)
        assert torch.equal(state.absmax, F.quantize_blockwise(a, blocksize=blocksize)[1].absmax)
        _, s = reference.scale(array(a), blocksize)
        codes = reference4.unpack(array(packed).reshape(-1), 9000)
        np.testing.assert_array_equal(codes, reference4.encode(name, s))
        state.dtype = torch.bfloat16
        level = F.get_4bit_type(name, device)[torch.from_numpy(codes).to(device).long()]
        scales = state.absmax.repeat_interleave(blocksize)[:9000]
        assert torch.equal(F.dequantize_4bit(packed, state), (level * scales).bfloat16())


@rule(
    "packing-4bit",
    "Two codes share a byte: element 2 j is its upper half, element 2 j + 1 the lower one.",
    "Where the number of elements is odd, a zero is quantized as if it were the last.",
)
def test_packing(device):
    packed, _ = F.quantize_nf4(tensor([1, -1, 0.5, 0], device))
    assert packed.flatten().tolist() == [0xF0, 0xC7]
    packed, _ = F.quantize_nf4(tensor([1, -1, 0.5], device))
    assert packed.flatten().tolist() == [0xF0, 0xC7]
    packed, _ = F.quantize_fp4(tensor([1], device))
    assert packed.flatten().tolist() == [0x30]
    packed, _ = F.quantize_nf4(tensor([0], device))  # in a block of zeros, s of that zero is NaN
    assert packed.flatten().tolist() == [0]


@rule(
    "nf4",
    "`nf4` has sixteen ascending levels from -1 to 1, at quantiles of the normal distribution; "
    "code 7 is zero.",
    "Its fifteen thresholds are the f32 midpoints `(level[k] + level[k+1]) * 0.5`; an s on a "
    "threshold takes the lower code.",
    "a tie takes the lower level, but for six thresholds that f32 rounds up: an s on one of them "
    "is nearer to the upper level, by less than 6e-8, and takes the lower one.",
)
def test_nf4(device):
    levels = array(F.get_4bit_type("nf4", device))
    np.testing.assert_array_equal(levels, reference4.nf4_levels())
    assert (np.diff(levels) > 0).all() and levels[[0, 7, 15]].tolist() == [-1, 0, 1]
    thresholds = (levels[:-1] + levels[1:]) * f32(0.5)
    k = np.arange(15)
    below, on, above = (codes4_of(s, device, "nf4") for s in around(thresholds))
    np.testing.assert_array_equal(below, k)
    np.testing.assert_array_equal(on, k)
    np.testing.assert_array_equal(above, k + 1)
    exact, upper = thresholds.astype(np.float64), levels[1:].astype(np.float64)
    closer = (exact - levels[:-1]) - (upper - exact)  # to the upper level than to the lower
    assert (closer > 0).sum() == 6 and closer.max() < 6e-8


@rule(
    "fp4",
    "`fp4` has a sign bit (8) and eight magnitudes, twelfths of",
    "| magnitude * 12 | 0 | 0.0625 | 8 | 12 | 4 | 6 | 2 | 3 |",
    "each rounded to f32.",
)
def test_fp4(device):
    magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]).astype(f32) / f32(12)
    levels = np.concatenate([magnitudes, -magnitudes])
    np.testing.assert_array_equal(array(F.get_4bit_type("fp4", device)), levels)
    codes = torch.tensor([[16 * c + 3] for c in range(16)], dtype=torch.uint8, device=device)
    one = torch.ones(1, device=device)
    values = ops.dequantize_4bit(codes, one, BLOCK, "fp4", [32], torch.float32)
    np.testing.assert_array_equal(array(values)[::2], levels)


@rule(
    "fp4-thresholds",
    "Seven thresholds of |s|, in the order of codes 0, 1, 6, 7, 4, 5, 2, 3, are 0.00260417, "
    "0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333 and 0.8333333",
    "An s on a threshold takes the smaller magnitude.",
)
def test_fp4_thresholds(device):
    order = np.array([0, 1, 6, 7, 4, 5, 2, 3])
    numbers = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    _, on, above = around(numbers)
    for sign in (0, 8):
        flip = -1 if sign else 1
        np.testing.assert_array_equal(codes4_of(flip * on, device, "fp4"), order[:-1] + sign)
        np.testing.assert_array_equal(codes4_of(flip * above, device, "fp4"), order[1:] + sign)


@rule(
    "fp4-sign",
    "The sign bit is set when s < 0: zero and -0 are code 0, a tiny negative s is code 8, which "
    "decodes to -0. `get_4bit_type` has +0 there.",
)
def test_fp4_sign(device):
    codes, _, values = quantized4([1, 0.0, -0.0, -1e-6], device, "fp4")
    assert codes.tolist() == [3, 0, 0, 8]
    assert np.signbit(values).tolist() == [False, False, False, True]
    assert not F.get_4bit_type("fp4", device)[8].signbit()


@rule(
    "error-4bit",
    "The error of a decoded number is at most 0.152 absmax (`nf4`) or 0.167 absmax (`fp4`).",
)
def test_error_of_4bit_codes(device):
    for name, bound in (("nf4", 0.152), ("fp4", 0.167)):
        blocks, places = in_blocks_of_absmax_1(np.linspace(-1, 1, 63 * 100, dtype=f32))
        error = np.abs(quantized4(blocks, device, name)[2] - blocks)[places]
        assert 0.97 * bound < error.max() < bound


@rule("zero-4bit", "element 0 or -0, absmax > 0 | | 7 / 0 | 0 |")
def test_zero_in_4_bits(device):
    for name, zero in (("nf4", 7), ("fp4", 0)):
        codes, _, values = quantized4([0.0, 5.0, -0.0], device, name)
        assert codes[[0, 2]].tolist() == [zero, zero] and values.tolist() == [0, 5, 0]


@rule("zeros-4bit", "only zeros | 0 | 0 / 0 (0 * inf is NaN, which exceeds nothing) | -0 / 0 |")
def test_zeros_in_4_bits(device):
    for name, negative in (("nf4", True), ("fp4", False)):
        codes, absmax, values = quantized4([0.0, -0.0] * 50, device, name)
        assert not codes.any() and absmax.tolist() == [0, 0]
        assert not values.any() and (np.signbit(values) == negative).all()


@rule("nan-4bit", "a NaN among the elements | NaN | 0 / 0 | NaN, the whole block |")
def test_nan_in_4_bits(device):
    for name in ("nf4", "fp4"):
        for nan in (NAN, -NAN):
            codes, absmax, values = quantized4([1, nan, INF, 0], device, name)
            assert np.isnan(absmax).all() and not codes.any() and np.isnan(values).all()


@rule(
    "infinity-4bit",
    "an infinity, no NaN | infinity | 0 / 0 for the infinities, 7 / 0 for the others | `nf4`: "
    "-infinity for the infinities, NaN for the others; `fp4`: NaN |",
)
def test_infinity_in_4_bits(device):
    codes, absmax, values = quantized4([INF, 3, -INF, 0], device, "nf4")
    assert codes.tolist() == [0, 7, 0, 7] and absmax.tolist() == [INF]
    np.testing.assert_array_equal(values, [-INF, NAN, -INF, NAN])
    codes, absmax, values = quantized4([INF, 3, -INF, 0], device, "fp4")
    assert not codes.any() and absmax.tolist() == [INF] and np.isnan(values).all()


@rule(
    "overflow-4bit",
    "1 / absmax overflows (absmax < 2.94e-39) | as it is | 15 / 3 above zero, 0 / 11 below, 0 / 0 "
    "for zeros | within absmax of the input |",
)
def test_overflow_of_the_reciprocal_in_4_bits(device):
    a = np.array([2.93e-39, -2.93e-39, 1e-39, 0], f32)
    for name, above, below in (("nf4", 15, 0), ("fp4", 3, 11)):
        codes, absmax, values = quantized4(a, device, name)
        assert absmax.tolist() == [a[0]] and codes.tolist() == [above, below, above, 0]
        assert (np.abs(values.astype(np.float64) - a) <= a[0]).all()


@rule(
    "storage-4bit",
    "Packed codes can be carried by any integer or floating-point dtype: the bytes are the same. "
    "Zero bytes fill up the last element of a wide dtype.",
)
def test_storage(device):
    a = torch.randn(202, device=device)  # 101 bytes
    want, _ = F.quantize_nf4(a)
    for dtype in (torch.int8, torch.int32, torch.int64, torch.float16, torch.float64):
        packed, _ = F.quantize_nf4(a, quant_storage=dtype)
        assert packed.dtype == dtype
        got = packed.contiguous().view(torch.uint8).flatten()
        assert torch.equal(got[:101], want.flatten()) and not got[101:].any()


def nearest(values, bits):
    """The nearest numbers with so many significant bits."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def relative_error(values, levels):
    return math.sqrt(np.mean(np.square(values - levels)) / np.mean(np.square(levels)))


@rule("products-4bit", "0.4 (bfloat16) or 0.3 (float16)", "FP4 has none", "from 1 to 2")
def test_roundings_of_multiples_of_levels():
    random = np.random.default_rng(1)
    for bits, ratio in ((8, 0.4), (11, 0.3)):
        levels = np.float64(reference4.levels("nf4"))
        multiples = np.arange(2 ** (bits - 1), 2**bits) / 2 ** (bits - 1)
        kept = min(relative_error(nearest(c * levels, bits) / c, levels) for c in multiples)
        scales = random.uniform(1, 2, 10000)
        dequantized = [relative_error(nearest(s * levels, bits) / s, levels) for s in scales]
        assert round(kept / math.sqrt(np.mean(np.square(dequantized))), 1) == ratio
        twelfths = np.round(np.float64(reference4.levels("fp4")) * 192) / 192
        assert (nearest(1.5 * twelfths, bits) == 1.5 * twelfths).all()


@rule("products-4bit", "sums in f32 and rounds once", "the numbers of `dequantize_4bit`")
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_weights_of_products(device, gpu_kernels, name):
    for dtype, step in ((torch.float32, 2.0**-24), (torch.float16, 2.0**-11)):
        values = torch.randn(16, 256, device=device)
        packed, state = F.quantize_4bit(values, quant_type=name, blocksize=BLOCK)
        unit = torch.eye(256, device=device, dtype=dtype)
        out = bnb.matmul_4bit(unit, packed, state).t()
        weight = F.dequantize_4bit(packed, state)
        if gpu_kernels:
            # The rounding of the result, and that of the weight.
            bound = (2 if name == "nf4" else 1.01) * step * weight.abs() + 2.0**-25
            assert ((out - weight).abs() <= bound).all()
        else:
            assert torch.equal(out, weight.to(dtype))


# --- quantiles ------------------------------------------------------------------------------------


@rule(
    "quantiles",
    "quantile[k] = the element of rank round((offset + k (1 - 2 offset) / 255) (n - 1)), k = 0 ... "
    "255",
    "in ascending order, halves away from zero, computed in float64: an element of the tensor, "
    "exactly, on every device.",
    "-0 comes before 0 and every NaN after infinity, whatever its sign.",
)
def test_quantiles(device):
    k = np.arange(256)
    for n, offset in ((1000, 1 / 512), (511, 0.0), (7, 0.25)):
        a = torch.randn(n)
        ranks = np.floor((offset + k * (1 - 2 * offset) / 255) * (n - 1) + 0.5).astype(int)
        got = ops.estimate_quantiles(a.to(device), offset)
        assert torch.equal(got.cpu(), a.sort().values[torch.from_numpy(ranks)])
    got = ops.estimate_quantiles(tensor([-NAN, INF, 0.0, -0.0], device), 0.0)
    got = array(got)[[0, 85, 170, 255]]
    assert got[:2].tolist() == [0, 0] and np.signbit(got[:2]).tolist() == [True, False]
    assert got[2] == INF and np.isnan(got[3])


@rule(
    "histogram",
    "`histogram_scatter_add_2d` adds f32 numbers, those of a cell in an order that is the same in "
    "every run on CPU and CUDA.",
)
def test_histogram(device):
    index = torch.randint(3, (2, 20_000), dtype=torch.int32, device=device)
    source = torch.randn(20_000, device=device)
    results = torch.zeros(3, 3, 3, device=device)
    for histogram in results:
        F.histogram_scatter_add_2d(histogram, *index, source)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    want = np.zeros((3, 3))
    np.add.at(want, tuple(array(index)), array(source).astype(np.float64))
    np.testing.assert_allclose(array(results[0]), want, rtol=1e-4, atol=1e-3)


# --- int8 -----------------------------------------------------------------------------------------


@rule(
    "int8",
    "outlier = |a| >= threshold, when threshold > 0; NaN never is one, infinity is",
    "stat[row] = max |a| over the row's elements that are no outliers",
    "code = round(a * (127 / stat)), ties to even, bounded to [-127, 127]",
    "code = 0 in every column that holds an outlier in any row",
    "out[i, j] = fma(sum_k CA[i,k] CB[j,k], SCB[j] * (SCA[i] * f32(1 / 127^2)), bias[j])",
    "`127 / stat` is one rounded division.",
    "The bias is widened to f32, and the result rounded once to its dtype.",
)
def test_int8(device):
    a = tensor([[127, 2.5, 3.5, -2.5], [6, -254, 1, 0]], device)
    codes, stats, columns = F.int8_vectorwise_quant(a)
    assert columns is None and stats.tolist() == [127, 254]
    assert codes.tolist() == [[127, 2, 4, -2], [3, -127, 0, 0]]  # 0.5 is a tie, too
    a = tensor([[1, 6, 2, NAN], [INF, 5, 3, 1]], device)
    codes, stats, columns = F.int8_vectorwise_quant(a, threshold=6.0)
    assert columns.tolist() == [0, 1]
    assert np.isnan(stats[0].item()) and stats[1].item() == 5
    assert codes.tolist() == [[0, 0, 0, 0], [0, 0, 76, 25]]

    CA, CB = (torch.randint(-127, 128, (n, 65), dtype=torch.int8, device=device) for n in (5, 7))
    SCA, SCB = torch.rand(5, device=device), torch.rand(7, device=device)
    bias = torch.randn(7, device=device).bfloat16()
    sums = array(CA).astype(np.int64) @ array(CB).astype(np.int64).T
    scales = array(SCB) * (array(SCA)[:, None] * f32(1 / 127**2))
    assert scales.dtype == f32
    exact = sums.astype(np.float64) * scales + array(bias.float())  # rounded by 2^-53 at most
    for dtype in (torch.float32, torch.float16):
        got = ops.int8_scaled_mm(CA, CB, SCA, SCB, bias, dtype)
        assert torch.equal(got.cpu(), torch.from_numpy(exact.astype(f32)).to(dtype))


def int8_row(row, device, threshold=0.0):
    """Statistic, codes, and the product with a row of ones plus a bias of 0.5."""
    codes, stats, _ = F.int8_vectorwise_quant(tensor([row], device), threshold)
    ones = torch.ones(1, len(row), dtype=torch.int8, device=device)
    one, bias = torch.ones(1, device=device), torch.full((1,), 0.5, device=device)
    product = ops.int8_scaled_mm(codes, ones, stats, one, bias, torch.float32)
    return stats.item(), codes[0].tolist(), product.item()


@rule("int8-zeros", "only zeros | 0 | 0 | bias |")
def test_int8_zeros(device):
    assert int8_row([0.0, -0.0], device) == (0, [0, 0], 0.5)


@rule("int8-nan", "a NaN that counts | NaN | 0 | NaN |")
def test_int8_nan(device):
    stat, codes, product = int8_row([1, NAN, 2], device)
    assert np.isnan(stat) and codes == [0, 0, 0] and np.isnan(product)


@rule("int8-infinity", "an infinity that counts (no threshold) | infinity | 0 | NaN |")
def test_int8_infinity(device):
    stat, codes, product = int8_row([1, -INF, 2], device)
    assert stat == INF and codes == [0, 0, 0] and np.isnan(product)
    assert int8_row([1, -INF], device, threshold=6.0)[:2] == (1, [127, 0])


@rule("int8-overflow", "127 / stat overflows (stat < 3.7e-37) | as it is | 0 | bias |")
def test_int8_overflow(device):
    assert int8_row([3.7e-37, 0], device) == (f32(3.7e-37), [0, 0], 0.5)
    assert int8_row([3.8e-37, 0], device)[:2] == (f32(3.8e-37), [127, 0])


@rule(
    "int8-linear",
    "`int8_linear` sums their products (f32 activations times codes) with one fma each, in the "
    "order of the columns:",
    "out[i, j] = fma(sum_k CA[i,k] CB[j,k], SCB[j] * (SCA[i] * f32(1 / 127^2)), "
    "fma(sum_o A[i,o] CB[j,o], SCB[j] * f32(1 / 127), bias[j]))",
)
def test_int8_linear(device, gpu_kernels):
    a = torch.randn(5, 65, device=device)
    a[1, 7], a[3, 7], a[4, 60], a[0, 20] = 7.5, -40.25, 6.0, 1e4
    CB = torch.randint(-127, 128, (7, 65), dtype=torch.int8, device=device)
    SCB, bias = torch.rand(7, device=device), torch.randn(7, device=device)
    CA, SCA, columns = F.int8_vectorwise_quant(a, threshold=6.0)
    assert columns.tolist() == [7, 20, 60]
    # Each fma is computed in float64, whose rounding is 2^-53 at most, and rounded to f32.
    added = np.zeros((5, 7), f32)
    for o in columns.tolist():
        term = array(a)[:, [o]].astype(np.float64) * array(CB)[:, o]
        added = (added + term).astype(f32)
    first = added * (array(SCB) * f32(1 / 127)).astype(np.float64) + array(bias)
    scales = array(SCB) * (array(SCA)[:, None] * f32(1 / 127**2))
    assert scales.dtype == f32
    sums = array(CA).astype(np.int64) @ array(CB).astype(np.int64).T
    want = (sums * scales.astype(np.float64) + first.astype(f32)).astype(f32)
    got, _ = ops.int8_linear(a, CB, SCB, bias, 6.0)
    if not gpu_kernels:
        np.testing.assert_array_equal(array(got), want)
    else:  # sums of outliers in another order
        terms = np.abs(sums * scales) + np.abs(array(bias))
        terms += np.abs(array(a)[:, columns.cpu()]) @ np.abs(array(CB)[:, columns.cpu()] * 1.0).T
        assert (np.abs(array(got) - want) <= 2.0**-22 * terms).all()


@rule(
    "int8-mixed",
    "In `int8_mixed_scaled_mm` the product of the remaining columns and that of the outlier "
    "columns (f32 activations times codes, times `SCB / 127`) are added in f32, then the bias, "
    "then there is one rounding.",
)
def test_int8_with_outlier_columns(device):
    # All numbers are whole, so that only the last rounding is one.
    a = torch.randint(-3, 4, (4, 33), device=device).float()
    a[1, 5], a[:, 0] = 200.0, 127.0
    codes, stats, columns = F.int8_vectorwise_quant(a, threshold=150.0)
    assert columns.tolist() == [5] and (stats == 127).all()
    CB = torch.randint(-127, 128, (6, 33), dtype=torch.int8, device=device)
    SCB, bias = torch.full((6,), 127.0, device=device), torch.randn(6, device=device)
    want = array(a).astype(np.float64) @ array(CB).astype(np.float64).T + array(bias)
    got, _ = ops.int8_mixed_scaled_mm(a.half(), codes, CB, stats, SCB, columns, bias.half())
    assert got.dtype == torch.float16
    np.testing.assert_allclose(array(got), want, rtol=2.0**-11 + 1e-5, atol=1e-2)


@rule(
    "int8-value",
    "A code by itself is worth `code * stat * f32(1 / 127)`, both products rounded.",
)
def test_int8_value(device):
    codes = torch.arange(-127, 128, device=device).to(torch.int8).view(1, -1)
    stat = torch.rand(1, device=device)
    want = (array(codes).astype(f32) * array(stat)) * f32(1 / 127)
    np.testing.assert_array_equal(array(F.int8_vectorwise_dequant(codes, stat)), want)


@rule(
    "int8-gradients",
    "Gradients of `matmul` and `Linear8bitLt` take quantization of the activations as the "
    "identity: `dA = dout W` with W dequantized to the dtype of A",
    "`dbias` summed in the wider of its own dtype and that of dout.",
)
def test_int8_gradients(device):
    layer = bnb.nn.Linear8bitLt(32, 8, has_fp16_weights=False).to(device)
    layer.bias.requires_grad_()
    x = torch.randn(5, 32, device=device, requires_grad=True)
    out = layer(x)
    dout = torch.randn_like(out)
    out.backward(dout)
    weight = F.int8_vectorwise_dequant(layer.state.CB, layer.state.SCB)
    torch.testing.assert_close(x.grad, dout @ weight)
    torch.testing.assert_close(layer.bias.grad, dout.sum(0))
