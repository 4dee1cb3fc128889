# SPDX-License-Identifier: MIT
"""The int8 ops against their executable specification and against recordings."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import bitsandbytes.functional as F
from bitsandbytes.plain import int8 as plain
from reference import linear as reference

ops = torch.ops.bitsandbytes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIGNIFICAND = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["dispatched", "plain"])
def int8(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain if request.param == "plain" else ops


def numpy(tensor):
    """float64 or integer array of a tensor; every float32 is one of its values."""
    tensor = tensor.detach().cpu()
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def assert_quantized(result, a, threshold):
    """Compares all three results with the specification, bit for bit."""
    codes, stats, outlier_cols = result
    rows = a.numel() // a.shape[-1] if a.shape[-1] else a[..., :0].sum(-1).numel()
    want_codes, want_stats, want_cols = reference.quantize(
        numpy(a).reshape(rows, a.shape[-1]), threshold
    )
    assert codes.dtype == torch.int8 and codes.shape == a.shape
    assert stats.dtype == torch.float32 and stats.shape == (rows,)
    np.testing.assert_array_equal(numpy(codes).reshape(want_codes.shape), want_codes)
    np.testing.assert_array_equal(numpy(stats), want_stats)
    assert (outlier_cols is None) == (threshold == 0)
    if threshold:
        assert outlier_cols.dtype == torch.int64
        np.testing.assert_array_equal(numpy(outlier_cols), want_cols)


def assert_close(actual, expected, dtype, *terms):
    """Compares within the float32 error of summing `terms` and one rounding to dtype."""
    assert actual.dtype == dtype
    error = np.abs(numpy(actual) - expected)
    assert (error <= reference.closeness(SIGNIFICAND[dtype], expected, *terms)).all()


def codes_and_stats(rows, columns, device):
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    return codes, torch.rand(rows, device=device) * 4 + 0.1


# --- quantization -------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_matches_specification(int8, device, dtype, threshold):
    a = (torch.randn(17, 130, device=device) * 2).to(dtype)
    before = a.clone()
    assert_quantized(int8.int8_vectorwise_quant(a, threshold), a, threshold)
    assert torch.equal(a, before)
    assert a._version == 0


LAYOUTS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda a: torch.stack([a, a * 3 + 1], -1)[..., 0],
    "offset": lambda a: torch.cat([a.flatten().new_ones(1), a.flatten()])[1:].view(a.shape),
    "expanded": lambda a: a[:1].expand(a.shape) if a.shape[0] else a,
}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.lists(st.integers(0, 6), max_size=3).flatmap(
        lambda lead: st.integers(0, 40).map(lambda columns: (*lead, columns))
    ),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    threshold=st.sampled_from([0.0, 1.0, 2.5]),
    seed=st.integers(0, 2**16),
)
def test_quant_any_shape_dtype_and_layout(int8, shape, dtype, layout, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    a = LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype))
    assert_quantized(int8.int8_vectorwise_quant(a, threshold), a, threshold)


def test_quant_rounds_ties_to_even(int8, device):
    a = torch.tensor([[127.0, 0.5, 1.5, 2.5, -1.5, -0.5]], device=device)
    codes, _, _ = int8.int8_vectorwise_quant(a)
    assert codes.tolist() == [[127, 0, 2, 2, -2, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_special_rows(int8, device, dtype):
    a = torch.tensor(
        [
            [0.0, -0.0, 0.0],
            [1.0, NAN, -2.0],
            [1.0, INF, -2.0],
            [-INF, NAN, 0.0],
            [1.0, -1.0, 0.25],
        ],
        device=device,
    ).to(dtype)
    codes, stats, _ = int8.int8_vectorwise_quant(a)
    assert codes.tolist() == [[0, 0, 0]] * 4 + [[127, -127, 32]]
    np.testing.assert_array_equal(numpy(stats), [0.0, NAN, INF, NAN, 1.0])


def test_quant_row_too_small_for_a_scale(int8, device):
    # 127 / 1e-37 is infinite in float32, 127 / 4e-37 is not.
    a = torch.tensor([[1e-37, -1e-38, 0.0], [4e-37, -2e-37, 0.0]], device=device)
    codes, stats, _ = int8.int8_vectorwise_quant(a)
    assert codes.tolist() == [[0, 0, 0], [127, -64, 0]]
    assert torch.equal(stats, a[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quant_range_beyond_float16(int8, device, dtype):
    a = torch.tensor([[1e30, -5e29], [1e-30, 2.5e-31]], device=device).to(dtype)
    codes, stats, _ = int8.int8_vectorwise_quant(a)
    assert torch.equal(stats, a[:, 0].float())
    assert codes[:, 0].tolist() == [127, 127]
    assert_quantized((codes, stats, None), a, 0.0)


def test_quant_threshold_is_inclusive(int8, device):
    a = torch.tensor([[6.0, 5.5, 1.0, -1.0], [1.0, 2.0, -6.0, 0.5]], device=device)
    codes, stats, outlier_cols = int8.int8_vectorwise_quant(a, 6.0)
    assert outlier_cols.tolist() == [0, 2]
    assert stats.tolist() == [5.5, 2.0]  # 1.0 of row 1 counts, although its column is an outlier
    assert codes.tolist() == [[0, 127, 0, -23], [0, 127, 0, 32]]


def test_quant_without_outliers_returns_empty_columns(int8, device):
    _, _, outlier_cols = int8.int8_vectorwise_quant(torch.ones(2, 3, device=device), 6.0)
    assert outlier_cols.dtype == torch.int64 and outlier_cols.tolist() == []


def test_quant_row_of_outliers_only(int8, device):
    codes, stats, outlier_cols = int8.int8_vectorwise_quant(
        torch.tensor([[7.0, INF], [1.0, 1.0]], device=device), 6.0
    )
    assert codes.tolist() == [[0, 0], [0, 0]]
    assert stats.tolist() == [0.0, 1.0]
    assert outlier_cols.tolist() == [0, 1]


def test_quant_nan_is_no_outlier(int8, device):
    codes, stats, outlier_cols = int8.int8_vectorwise_quant(
        torch.tensor([[NAN, 1.0], [1.0, 2.0]], device=device), 6.0
    )
    assert outlier_cols.tolist() == []
    assert codes.tolist() == [[0, 0], [64, 127]]
    assert stats[0].isnan() and stats[1] == 2.0


def test_quant_leaves_read_only_memory_alone(int8):
    array = np.ones((2, 3), np.float32)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that it cannot protect the memory
        a = torch.from_numpy(array)
    codes, _, _ = int8.int8_vectorwise_quant(a, 0.5)
    assert codes.tolist() == [[0] * 3] * 2
    assert (array == 1).all()


def test_round_trip_error_is_half_a_step(int8, device):
    a = torch.randn(9, 257, device=device)
    codes, stats, _ = int8.int8_vectorwise_quant(a)
    error = (int8.int8_vectorwise_dequant(codes, stats) - a).abs()
    assert (error <= stats[:, None] * (0.5 / 127 + 2**-22)).all()


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_dequant_matches_specification(int8, device, lead):
    codes = torch.randint(-128, 128, (*lead, 50), dtype=torch.int8, device=device)
    stats = torch.rand(*lead, 1, device=device) * 9
    values = int8.int8_vectorwise_dequant(codes, stats)
    expected = reference.dequantize(numpy(codes).reshape(-1, 50), numpy(stats).reshape(-1))
    assert values.shape == codes.shape
    assert_close(values.view(-1, 50), expected, torch.float32, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (9, 100), (300, 8), (3, 2500)])
def test_dequant_to_a_dtype_rounds_the_value_once(int8, device, shape, dtype):
    plainly = int8 is plain
    dequantize = (
        int8.int8_vectorwise_dequant_dtype if plainly else int8.int8_vectorwise_dequant.dtype
    )
    rows, columns = shape
    wide = torch.randint(-128, 128, (rows, columns + 24), dtype=torch.int8, device=device)
    stats = torch.rand(rows, device=device) * 9
    for codes in (wide[:, 8 : 8 + columns], wide[:, 3 : 3 + columns], wide.t()[:rows].t()):
        of_rows = stats[: codes.shape[0]]
        values = dequantize(codes, of_rows, dtype)
        assert values.dtype == dtype and values.is_contiguous()
        assert torch.equal(values, plain.int8_vectorwise_dequant(codes, of_rows).to(dtype))


def test_dequant_of_full_codes_is_the_statistic(int8, device):
    codes = torch.tensor([[127, -127, 0]], dtype=torch.int8, device=device)
    assert int8.int8_vectorwise_dequant(codes, torch.ones(1, device=device)).tolist() == [
        [1, -1, 0]
    ]


# --- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [0, 1, 3, 64, 1023, 1025, 8191])
def test_matmul_is_exact(int8, device, terms):
    a = torch.randint(-128, 128, (5, terms), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (7, terms), dtype=torch.int8, device=device)
    full = [(torch.full_like(a, code), torch.full_like(b, code)) for code in (127, -128)]
    for left, right in ((a, b), *full):
        product = int8.int8_linear_matmul(left, right)
        assert product.dtype == torch.int32
        np.testing.assert_array_equal(numpy(product), reference.matmul(numpy(left), numpy(right)))


def test_matmul_wraps_beyond_int32(int8, device):
    a = torch.full((1, 140_000), 127, dtype=torch.int8, device=device)
    assert int8.int8_linear_matmul(a, a).item() == 127 * 127 * 140_000 - 2**32


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 0, 3), (2, 2, 3)])
def test_matmul_keeps_leading_shape(int8, device, lead):
    a = torch.randint(-127, 128, (*lead, 20), dtype=torch.int8, device=device)
    b = torch.randint(-127, 128, (6, 20), dtype=torch.int8, device=device)
    product = int8.int8_linear_matmul(a, b)
    assert product.shape == (*lead, 6)
    expected = reference.matmul(numpy(a).reshape(-1, 20), numpy(b))
    np.testing.assert_array_equal(numpy(product).reshape(-1, 6), expected)


def test_matmul_of_strided_operands(int8, device):
    a = torch.randint(-127, 128, (20, 8), dtype=torch.int8, device=device).t()[::2]
    b = torch.randint(-127, 128, (6, 40), dtype=torch.int8, device=device)[:, ::2]
    expected = reference.matmul(numpy(a), numpy(b))
    np.testing.assert_array_equal(numpy(int8.int8_linear_matmul(a, b)), expected)


def test_products_are_exact_under_autocast(int8, device):
    a, row_stats = codes_and_stats(4, 3000, device)
    b, col_stats = codes_and_stats(5, 3000, device)
    x = torch.randn(4, 3000, device=device)
    columns = torch.tensor([1, 7], device=device)
    args = (x, a, b, row_stats, col_stats, columns)
    want_product, (want, _) = int8.int8_linear_matmul(a, b), int8.int8_mixed_scaled_mm(*args)
    with torch.autocast(device, torch.bfloat16):
        product, (got, _) = int8.int8_linear_matmul(a, b), int8.int8_mixed_scaled_mm(*args)
    assert torch.equal(product, want_product)
    assert torch.equal(got, want)


@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mm_dequant_matches_specification(int8, device, dtype, bias_dtype):
    product = torch.randint(-(2**20), 2**20, (3, 4, 9), dtype=torch.int32, device=device)
    row_stats = torch.rand(3, 4, device=device) * 0.2
    col_stats = torch.rand(9, 1, device=device) * 0.2
    bias = None if bias_dtype is None else torch.randn(9, device=device).to(bias_dtype)
    out = int8.int8_mm_dequant(product, row_stats, col_stats, dtype, bias)
    args = (numpy(product).reshape(12, 9), numpy(row_stats).ravel(), numpy(col_stats).ravel())
    scaled = reference.mm_dequant(*args)
    added = 0 if bias is None else numpy(bias)
    assert out.shape == product.shape
    assert_close(out.view(12, 9), scaled + added, dtype, scaled, added)


def test_mm_dequant_rounds_once(int8, device):
    # 2049 is no float16: with an early rounding the result would be 2048.
    product = torch.tensor([[16129 * 2049]], dtype=torch.int32, device=device)
    one = torch.ones(1, device=device)
    assert int8.int8_mm_dequant(product, one, one, None, one).item() == 2050


def test_mm_dequant_overflows_to_infinity_in_float16_only(int8, device):
    product = torch.tensor([[2**30]], dtype=torch.int32, device=device)
    stats = torch.tensor([100.0], device=device), torch.tensor([1.0], device=device)
    assert int8.int8_mm_dequant(product, *stats).isinf().all()
    assert int8.int8_mm_dequant(product, *stats, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (0,), (5,), (2, 3)])
def test_scaled_mm_matches_specification(int8, device, dtype, lead):
    a = torch.randint(-127, 128, (*lead, 70), dtype=torch.int8, device=device)
    rows = a.numel() // 70
    row_stats = torch.rand(rows, device=device) * 3
    b, col_stats = codes_and_stats(6, 70, device)
    bias = torch.randn(6, device=device)
    out = int8.int8_scaled_mm(a, b, row_stats, col_stats, bias, dtype)
    product = reference.matmul(numpy(a).reshape(rows, 70), numpy(b))
    scaled = reference.mm_dequant(product, numpy(row_stats), numpy(col_stats))
    assert out.shape == (*lead, 6)
    assert_close(out.reshape(rows, 6), scaled + numpy(bias), dtype, scaled, numpy(bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_scaled_mm_matches_specification(int8, device, dtype):
    a = torch.randn(2, 5, 64, device=device)
    a[0, 3, 11] = 20.0
    a[1, 4, 50] = -9.0
    a = a.to(dtype)
    b, col_stats = codes_and_stats(7, 64, device)
    bias = torch.randn(7, device=device).to(dtype)
    codes, row_stats, columns = int8.int8_vectorwise_quant(a, 6.0)
    out, outliers = int8.int8_mixed_scaled_mm(a, codes, b, row_stats, col_stats, columns, bias)
    assert columns.tolist() == [11, 50]
    assert out.shape == (2, 5, 7)
    assert torch.equal(outliers, a.view(10, 64)[:, [11, 50]])
    flat = numpy(a).reshape(10, 64)
    weight = reference.dequantize(numpy(b), numpy(col_stats))
    expected = reference.linear(flat, numpy(b), numpy(col_stats), numpy(bias), 6.0)
    outlier_term = np.abs(flat[:, [11, 50]]) @ np.abs(weight[:, [11, 50]]).T
    assert_close(out.view(10, 7), expected, dtype, expected, outlier_term, numpy(bias))


# Shapes of one tile of a kernel and of several, whole and not, and such as vendors' libraries take.
LAYERS = [
    *[(1, 70, 64), (2, 5, 48), (3, 5, 33), (4, 17, 544), (13, 3, 700), (16, 9, 32)],
    *[(20, 16, 40), (70, 72, 136), (300, 3, 17), (50, 130, 528), (70, 264, 144)],
    *[(11, 70, 16384), (70, 40, 4096)],
]


def planted(rows, columns, outliers, device):
    """Numbers below 4, and above it in the first rows of the last columns."""
    x = torch.randn(rows, columns, device=device).clamp_(-3.5, 3.5)
    for i in range(outliers):
        x[i % rows, columns - 1 - i] = 5.0 + i
    return x


def assert_layer(int8, device, shape, outliers, dtype):
    rows, outputs, terms = shape
    outliers = outliers and min(outliers, terms)
    x = planted(rows, terms, outliers or 0, device).to(dtype)
    b, col_stats = codes_and_stats(outputs, terms, device)
    bias = torch.randn(outputs, device=device).half() if rows > 1 else None
    threshold = 0.0 if outliers is None else 4.0
    out, mask = int8.int8_linear(x, b, col_stats, bias, threshold)
    shift = numpy(bias) if bias is not None else np.zeros(outputs)
    expected = reference.linear(numpy(x), numpy(b), numpy(col_stats), shift, threshold)
    assert (mask is None) == (outliers is None)
    columns = []
    if mask is not None:
        assert mask.dtype == torch.bool and mask.shape == (terms,)
        columns = numpy(mask).nonzero()[0]
        assert columns.tolist() == list(range(terms - outliers, terms))
    weight = reference.dequantize(numpy(b), numpy(col_stats))
    outlier_term = np.abs(numpy(x)[:, columns]) @ np.abs(weight[:, columns]).T
    if device == "cuda":
        # Tensor cores cut off 2^-23 of a sum after every 16 products, three of which are a float's;
        # the sum can be that of the codes and outlier columns together.
        sums = 2 * outlier_term + np.abs(expected) + np.abs(shift)
        outlier_term = outlier_term + sums * len(columns) * 3 / 16 / 4
    assert_close(out, expected, dtype, expected, outlier_term, shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [None, 0, 1, 200])
@pytest.mark.parametrize("shape", LAYERS)
def test_linear_matches_specification(int8, device, shape, outliers, dtype):
    assert_layer(int8, device, shape, outliers, dtype)


# Products for which a GPU has kernels of large tiles, and more of those than it makes at a time, or
# so few that several blocks of threads share a tile.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [None, 7, 100])
@pytest.mark.parametrize(
    "shape",
    [(150, 520, 1040), (530, 5000, 272), (20, 2300, 528), (64, 4001, 272), (101, 2300, 528)],
)
def test_linear_of_large_tiles_matches_specification(int8, device, shape, outliers, dtype):
    if device != "cuda":
        pytest.skip("as slow as it is large, and nothing new, without a GPU")
    assert_layer(int8, device, shape, outliers, dtype)


@pytest.mark.parametrize("outliers", [3, 100])
@pytest.mark.parametrize("rows", [8, 40, 150])
def test_linear_with_a_weight_larger_than_the_cache(int8, device, rows, outliers):
    if device != "cuda":
        pytest.skip("as slow as it is large, and nothing new, without a GPU")
    x = planted(rows, 4096, outliers, device)
    b, col_stats = codes_and_stats(20000, 4096, device)
    out, mask = int8.int8_linear(x, b, col_stats, None, 4.0)
    for part in (slice(0, 300), slice(19700, 20000)):
        want, want_mask = int8.int8_linear(x, b[part], col_stats[part], None, 4.0)
        # Another number of blocks adds the products of outlier columns in another order.
        torch.testing.assert_close(out[:, part], want, rtol=0, atol=1e-5 * want.abs().max().item())
        assert torch.equal(mask, want_mask)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize(
    ("shape", "outputs"), [((7,), 4), ((2, 3, 7), 4), ((0, 7), 4), ((2, 0), 4), ((2, 7), 0)]
)
def test_linear_keeps_leading_shape(int8, device, shape, outputs, threshold):
    x = torch.randn(shape, device=device) * 2
    b, col_stats = codes_and_stats(outputs, shape[-1], device)
    bias = torch.randn(outputs, device=device)
    out, mask = int8.int8_linear(x, b, col_stats, bias, threshold)
    assert out.shape == (*shape[:-1], outputs)
    if threshold:
        any_outlier = (x[None].flatten(0, -2).abs() >= threshold).any(0)
        assert torch.equal(mask, any_outlier)
    rows = out.numel() // outputs if outputs else 0
    if rows:
        flat = numpy(x).reshape(rows, shape[-1])
        stats = numpy(b), numpy(col_stats)
        expected = reference.linear(flat, *stats, numpy(bias), threshold)
        assert_close(out.view(rows, outputs), expected, torch.float32, 20 * np.ones_like(expected))


def test_linear_of_strided_operands(int8, device):
    x = planted(10, 24, 3, device)
    b, col_stats = codes_and_stats(9, 24, device)
    want, want_mask = int8.int8_linear(x, b, col_stats, None, 4.0)
    wide = torch.stack([x, x * 2], -1)[..., 0]
    out, mask = int8.int8_linear(wide, b.t().contiguous().t(), col_stats.view(1, 9), None, 4.0)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-5)  # libraries sum in other orders
    assert torch.equal(mask, want_mask)


def test_linear_multiplies_outliers_beyond_float16(int8, device):
    x = torch.tensor([[1.0, 1e6, -0.5]], device=device)
    codes = torch.tensor([[127, 127, 127]], dtype=torch.int8, device=device)
    out, mask = int8.int8_linear(x, codes, torch.ones(1, device=device), None, 6.0)
    assert mask.tolist() == [False, True, False]
    assert abs(out.item() - 1000000.5) < 1


@pytest.mark.parametrize("terms", [70, 800])
def test_linear_of_the_same_rows_whatever_stands_beside_them(int8, device, terms):
    x = planted(300, terms, 0, device)
    b, col_stats = codes_and_stats(66, terms, device)
    many, _ = int8.int8_linear(x, b, col_stats)
    for rows in (1, 5, 7, 40):
        few, _ = int8.int8_linear(x[:rows], b, col_stats)
        assert torch.equal(few, many[:rows])


@pytest.mark.cpu_kernels
def test_linear_on_each_instruction_set(cpu_isa):
    torch.manual_seed(3)
    x = planted(13, 200, 4, "cpu").bfloat16()
    b, col_stats = codes_and_stats(70, 200, "cpu")
    out, mask = ops.int8_linear(x, b, col_stats, None, 4.0)
    want, want_mask = plain.int8_linear(x, b, col_stats, None, 4.0)
    torch.testing.assert_close(out, want)
    assert torch.equal(mask, want_mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (6,), (), (0,)])
def test_gradient_of_linear_is_the_product_with_the_weight(int8, device, dtype, shape):
    b, col_stats = codes_and_stats(9, 40, device)
    grad = torch.randn(*shape, 9, device=device).to(dtype)
    weight = plain.int8_vectorwise_dequant_dtype(b, col_stats, dtype)
    got = int8.int8_linear_dgrad(grad, b, col_stats)
    assert got.dtype == dtype
    torch.testing.assert_close(got, grad @ weight)
    if grad.dim() > 1:
        strided = grad.mT.contiguous().mT, b.t().contiguous().t(), col_stats.view(1, 9)
        torch.testing.assert_close(int8.int8_linear_dgrad(*strided), got)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_gradient_of_an_empty_linear_is_zero(int8, device, sizes):
    rows, n, k = sizes
    b = torch.ones(n, k, dtype=torch.int8, device=device)
    grad = int8.int8_linear_dgrad(
        torch.ones(rows, n, device=device), b, torch.ones(n, device=device)
    )
    assert grad.shape == (rows, k)
    assert (grad == 0).all()


def test_gradient_by_parts_of_the_weight_is_that_of_the_whole(device):
    rows, n, k = 9, 17, 2**20
    b, col_stats = codes_and_stats(n, k, device)
    grad = torch.randn(rows, n, device=device)
    got = ops.int8_linear_dgrad(grad, b, col_stats)
    torch.testing.assert_close(got, plain.int8_linear_dgrad(grad, b, col_stats))


def test_mixed_scaled_mm_without_outliers_is_scaled_mm(int8, device):
    x = torch.randn(3, 40, device=device)
    b, col_stats = codes_and_stats(5, 40, device)
    codes, row_stats, columns = int8.int8_vectorwise_quant(x, 100.0)
    want = int8.int8_scaled_mm(codes, b, row_stats, col_stats, None, torch.float32)
    for none in (columns, None):
        out, outliers = int8.int8_mixed_scaled_mm(x, codes, b, row_stats, col_stats, none)
        torch.testing.assert_close(out, want)
        assert outliers.numel() == 0 and outliers.dtype == x.dtype


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_input_shows_in_its_row_only(int8, device, bad):
    x = torch.randn(3, 16, device=device)
    x[1, 5] = bad
    b, col_stats = codes_and_stats(4, 16, device)
    codes, row_stats, _ = int8.int8_vectorwise_quant(x)
    out = int8.int8_scaled_mm(codes, b, row_stats, col_stats, None, torch.float32)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


# --- the functions ------------------------------------------------------------------------------


def test_functions_are_the_ops(device):
    x = torch.randn(6, 33, device=device)
    b, col_stats = codes_and_stats(5, 33, device)
    codes, row_stats, columns = F.int8_vectorwise_quant(x, threshold=2.0)
    for got, want in zip(
        (codes, row_stats, columns), ops.int8_vectorwise_quant(x, 2.0), strict=True
    ):
        assert torch.equal(got, want)
    values = F.int8_vectorwise_dequant(codes, row_stats)
    assert torch.equal(values, ops.int8_vectorwise_dequant(codes, row_stats))
    product = F.int8_linear_matmul(codes, b)
    assert torch.equal(product, ops.int8_linear_matmul(codes, b))
    result = F.int8_mm_dequant(product, row_stats, col_stats, bias=col_stats)
    want = ops.int8_mm_dequant(product, row_stats, col_stats, torch.float16, col_stats)
    assert torch.equal(result, want)


def test_matmul_out(device):
    a = torch.randint(-127, 128, (2, 3, 20), dtype=torch.int8, device=device)
    b = torch.randint(-127, 128, (6, 20), dtype=torch.int8, device=device)
    out = torch.empty(2, 3, 6, dtype=torch.int32, device=device)
    assert F.int8_linear_matmul(a, b, out=out) is out
    assert torch.equal(out, F.int8_linear_matmul(a, b))
    plain.int8_linear_matmul_out(a, b, out.zero_())
    assert torch.equal(out, F.int8_linear_matmul(a, b))


def test_mm_dequant_out(device):
    product = torch.tensor([[16129, 5]], dtype=torch.int32, device=device)
    row_stats, col_stats = torch.ones(1, device=device), torch.ones(2, device=device)
    expected = np.array([[1.0, 5 / 16129]])
    result = F.int8_mm_dequant(product, row_stats, col_stats)
    assert_close(result, expected, torch.float16, expected)
    for dtype in DTYPES:
        out = torch.empty(1, 2, dtype=dtype, device=device)
        assert F.int8_mm_dequant(product, row_stats, col_stats, out=out) is out
        assert_close(out, expected, dtype, expected)


def test_functions_refuse_other_results(device):
    a = torch.zeros(1, 2, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="int8_linear_matmul: dtype must be"):
        F.int8_linear_matmul(a, a, dtype=torch.int8)
    product, one = a.int(), torch.ones(2, device=device)
    for out in (torch.empty(2, 1, device=device), torch.empty(1, 2, device=device).int()):
        with pytest.raises(ValueError, match="int8_mm_dequant: out must be"):
            F.int8_mm_dequant(product, one[:1], one, out=out)


# --- bad arguments ------------------------------------------------------------------------------

I8, I32 = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int32)
B8, ROWS, COLS = torch.zeros(3, 4, dtype=torch.int8), torch.ones(2), torch.ones(3)
X = torch.zeros(2, 4)

BAD = [
    ("int8_vectorwise_quant", "A", (X.double(),)),
    ("int8_vectorwise_quant", "A", (I8,)),
    ("int8_vectorwise_quant", "A", (torch.tensor(1.0),)),
    ("int8_vectorwise_quant", "threshold", (X, -1.0)),
    ("int8_vectorwise_quant", "threshold", (X, NAN)),
    ("int8_vectorwise_dequant", "A", (X, ROWS)),
    ("int8_vectorwise_dequant", "stats", (I8, ROWS.half())),
    ("int8_vectorwise_dequant", "stats", (I8, COLS)),
    ("int8_vectorwise_dequant.dtype", "A", (X, ROWS, torch.half)),
    ("int8_vectorwise_dequant.dtype", "stats", (I8, COLS, torch.half)),
    ("int8_vectorwise_dequant.dtype", "dtype", (I8, ROWS, torch.float64)),
    ("int8_linear_matmul", "A", (X, B8)),
    ("int8_linear_matmul", "B", (I8, B8.float())),
    ("int8_linear_matmul", "B", (I8, B8[:, :3])),
    ("int8_linear_matmul", "B", (I8, B8[None])),
    ("int8_linear_matmul", "A", (torch.tensor(1, dtype=torch.int8), B8)),
    ("int8_linear_matmul.out", "out", (I8, B8, I32.long())),
    ("int8_linear_matmul.out", "out", (I8, B8, I32.t())),
    ("int8_mm_dequant", "A", (X, ROWS, COLS)),
    ("int8_mm_dequant", "row_stats", (I32, COLS, COLS)),
    ("int8_mm_dequant", "row_stats", (I32, ROWS.half(), COLS)),
    ("int8_mm_dequant", "col_stats", (I32, ROWS, ROWS)),
    ("int8_mm_dequant", "col_stats", (I32, ROWS, COLS.double())),
    ("int8_mm_dequant", "dtype", (I32, ROWS, COLS, torch.int8)),
    ("int8_mm_dequant", "dtype", (I32, ROWS, COLS, torch.float64)),
    ("int8_mm_dequant", "bias", (I32, ROWS, COLS, None, ROWS)),
    ("int8_mm_dequant", "bias", (I32, ROWS, COLS, None, COLS.int())),
    ("int8_scaled_mm", "A", (X, B8, ROWS, COLS)),
    ("int8_scaled_mm", "B", (I8, B8.t(), ROWS, COLS)),
    ("int8_scaled_mm", "row_stats", (I8, B8, COLS, COLS)),
    ("int8_scaled_mm", "col_stats", (I8, B8, ROWS, ROWS)),
    ("int8_scaled_mm", "bias", (I8, B8, ROWS, COLS, ROWS)),
    ("int8_scaled_mm", "dtype", (I8, B8, ROWS, COLS, None, torch.int32)),
    ("int8_linear", "A", (X.double(), B8, COLS)),
    ("int8_linear", "A", (torch.tensor(1.0), B8, COLS)),
    ("int8_linear", "CB", (X, B8.float(), COLS)),
    ("int8_linear", "CB", (X, B8.t(), COLS)),
    ("int8_linear", "SCB", (X, B8, ROWS)),
    ("int8_linear", "SCB", (X, B8, COLS.half())),
    ("int8_linear", "bias", (X, B8, COLS, ROWS)),
    ("int8_linear", "bias", (X, B8, COLS, COLS.int())),
    ("int8_linear", "threshold", (X, B8, COLS, None, -1.0)),
    ("int8_linear", "threshold", (X, B8, COLS, None, NAN)),
    ("int8_linear_dgrad", "grad", (X.double(), B8.t(), COLS)),
    ("int8_linear_dgrad", "grad", (torch.tensor(1.0), B8, COLS)),
    ("int8_linear_dgrad", "CB", (X, B8.t().float(), COLS)),
    ("int8_linear_dgrad", "CB", (X, B8, COLS)),
    ("int8_linear_dgrad", "SCB", (X, B8.t(), ROWS[:1])),
    ("int8_linear_dgrad", "SCB", (X, B8.t(), torch.ones(X.shape[-1]).half())),
    ("int8_mixed_scaled_mm", "A", (X.double(), I8, B8, ROWS, COLS)),
    ("int8_mixed_scaled_mm", "A", (X[:1], I8, B8, ROWS, COLS)),
    ("int8_mixed_scaled_mm", "SCA", (X, I8, B8, COLS, COLS)),
    ("int8_mixed_scaled_mm", "SCB", (X, I8, B8, ROWS, ROWS)),
    ("int8_mixed_scaled_mm", "outlier_cols", (X, I8, B8, ROWS, COLS, ROWS)),
    ("int8_mixed_scaled_mm", "outlier_cols", (X, I8, B8, ROWS, COLS, I32.long())),
    ("int8_mixed_scaled_mm", "bias", (X, I8, B8, ROWS, COLS, None, ROWS)),
]


@pytest.mark.parametrize(("name", "argument", "args"), BAD)
def test_bad_argument_gets_a_sentence(int8, device, name, argument, args):
    op, _, overload = name.partition(".")
    if int8 is plain:
        call = getattr(plain, name.replace(".", "_"))
    else:
        call = getattr(getattr(ops, op), overload or "default")
    args = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    # Native kernels raise RuntimeError, the plain ones ValueError.
    with pytest.raises((ValueError, RuntimeError), match=rf"^int8_\w+: .*\b{argument} .*, got "):
        call(*args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_devices_must_agree():
    with pytest.raises((ValueError, RuntimeError)):
        ops.int8_linear_matmul(I8.cuda(), B8)
    with pytest.raises((ValueError, RuntimeError)):
        ops.int8_mm_dequant(I32.cuda(), ROWS, COLS.cuda())


# --- registration, compilation ------------------------------------------------------------------


def _samples(device):
    a, row_stats = codes_and_stats(6, 33, device)
    b, col_stats = codes_and_stats(5, 33, device)
    x = torch.randn(6, 33, device=device)
    x[2, 3] = 9
    product = ops.int8_linear_matmul(a, b)
    columns = torch.tensor([3], device=device)
    return {
        "int8_vectorwise_quant": [(x,), (x.half().view(2, 3, 33),), (x, 6.0)],
        "int8_vectorwise_dequant": [(a, row_stats)],
        "int8_linear_matmul": [(a, b), (a.view(2, 3, 33), b)],
        "int8_linear_matmul.out": [(a, b, torch.empty_like(product))],
        "int8_mm_dequant": [
            (product, row_stats, col_stats),
            (product, row_stats, col_stats, torch.bfloat16, col_stats.half()),
        ],
        "int8_scaled_mm": [
            (a, b, row_stats, col_stats),
            (a, b, row_stats, col_stats, col_stats, torch.float32),
        ],
        "int8_linear": [(x, b, col_stats), (x.bfloat16(), b, col_stats, col_stats, 6.0)],
        "int8_mixed_scaled_mm": [
            (x, a, b, row_stats, col_stats),
            (x, a, b, row_stats, col_stats, columns, col_stats),
        ],
    }


@pytest.mark.parametrize("name", list(_samples("cpu")))
def test_opcheck(device, name):
    op, _, overload = name.partition(".")
    for args in _samples(device)[name]:
        opcheck(getattr(getattr(ops, op), overload or "default"), args)


def test_compiles_into_one_graph(device):
    def layer(x, b, col_stats):
        codes, row_stats, _ = F.int8_vectorwise_quant(x)
        return F.int8_mm_dequant(F.int8_linear_matmul(codes, b), row_stats, col_stats)

    b, col_stats = codes_and_stats(5, 33, device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 7):
        x = torch.randn(rows, 33, device=device)
        assert torch.equal(compiled(x, b, col_stats), layer(x, b, col_stats))


# --- recordings ---------------------------------------------------------------------------------


def test_quant_matches_recording(device, golden):
    tensors = {name: tensor.to(device) for name, tensor in golden("int8").items()}
    for name, threshold in (("th0", 0.0), ("th6", 6.0)):
        codes, stats, columns = F.int8_vectorwise_quant(tensors["A"], threshold)
        assert torch.equal(codes, tensors[f"{name}.CA"])
        assert torch.equal(stats, tensors[f"{name}.SCA"])
        assert threshold == 0 or torch.equal(columns, tensors["th6.outlier_cols"])
    codes, stats, _ = F.int8_vectorwise_quant(tensors["B"])
    assert torch.equal(stats, tensors["SCB"])
    # The recorded division was not correctly rounded: two values next to a tie went one further.
    difference = (codes.int() - tensors["CB"].int()).abs()
    assert difference.max() <= 1 and difference.sum() <= 2


def test_product_matches_recording(device, golden):
    tensors = {name: tensor.to(device) for name, tensor in golden("int8").items()}
    product = F.int8_linear_matmul(tensors["th0.CA"], tensors["CB"])
    assert torch.equal(product, tensors["acc"])
    out = F.int8_mm_dequant(product, tensors["th0.SCA"], tensors["SCB"])
    # One unit in the last place where the recorded order of multiplications rounds differently.
    torch.testing.assert_close(out, tensors["out"], rtol=2**-10, atol=0)


def test_quant_matches_published_hash(device):
    i = torch.arange(4096)
    x = ((i * 7919 % 2003) - 1001).float() / 1024
    codes, _, _ = F.int8_vectorwise_quant((x * 8).half().view(64, 64).to(device))
    digest = hashlib.sha256(codes.cpu().numpy().tobytes()).hexdigest()
    assert digest == "0ea3078c42ce4d8c63c2986a901b0ab2201fc31c8155f55c1b4522f4d39ffe20"
