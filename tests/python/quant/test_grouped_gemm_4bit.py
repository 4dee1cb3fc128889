# SPDX-License-Identifier: MIT
"""Products of groups of rows with a 4-bit weight each, against their specification."""

import pytest
import torch
from products4 import assert_close_sums, make_weight
from quant_inputs import DTYPES, LAYOUTS, name_of, numpy

import bitsandbytes.functional as F
from bitsandbytes.plain import grouped_gemm_4bit as plain
from bitsandbytes.quant.scales import weight_arguments
from reference import gemm4 as reference

ops = torch.ops.bitsandbytes
TYPES = ("nf4", "fp4")
# E, N, K and blocksize: weights that begin in the middle of bytes and of blocks, blocks longer than
# weights, more weights than a warp has lanes, and what fits tensor cores.
SHAPES = (
    (1, 1, 1, 32),
    (3, 7, 33, 32),
    (5, 3, 5, 64),
    (40, 2, 7, 4096),
    (4, 65, 96, 64),
    (3, 66, 192, 128),
    (8, 130, 64, 32),
    (2, 40, 576, 256),
    (3, 17, 2113, 64),
)
# How many rows of 23 there are in a group of E, and where the last one ends.
DRAWS = {
    "all kinds": lambda e: torch.randint(0, 24, (e,)).sort().values,
    "everything in the first": lambda e: torch.full((e,), 23),
    "everything in the last": lambda e: torch.tensor([0] * (e - 1) + [23]),
    "none": lambda e: torch.zeros(e, dtype=torch.int64),
    "one each": lambda e: torch.arange(1, e + 1).clamp(max=23),
}


@pytest.fixture(params=["dispatched", "plain"])
def products(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain if request.param == "plain" else ops


def gemm(products, a, packed, offs, state, bias=None):
    weight, nested = weight_arguments(state, packed.device)
    return products.grouped_gemm_4bit(a, packed, offs, *weight, bias, *nested)


def dgrad(products, grad, packed, offs, state):
    weight, nested = weight_arguments(state, packed.device)
    return products.grouped_gemm_4bit_dgrad(grad, packed, offs, *weight, *nested)


def assert_products(result, a, weights, offs, bias=None, loose=False, by_torch=False):
    """That a result is the product of each group with its own weight ``[terms, columns]``."""
    arguments = (numpy(a), weights, offs.tolist(), None if bias is None else numpy(bias))
    want, size = (
        reference.grouped(lambda *group, i=i: reference.product(*group)[i], *arguments)
        for i in (0, 1)
    )
    kind = name_of(result.dtype)
    rounding = reference.sum_rounding(size, kind) if by_torch else 0.0
    if loose:
        rounding += reference.grouped(
            lambda rows, weight: reference.weight_rounding(rows, weight, kind), *arguments[:3]
        )
    assert_close_sums(result, want, size, weights.shape[1], rounding)
    assert not result[int(offs[-1]) :].any()


def check_both(
    products, shape, blocksize, nested, dtype, device, offs, rows=23, loose=False, by_torch=False
):
    e, n, k = shape
    quant_type = TYPES[n % 2]
    rounded = torch.float32 if loose else dtype
    packed, state, weight = make_weight(shape, blocksize, quant_type, nested, rounded, device)
    a = torch.randn(rows, k).to(device, dtype)
    grad = torch.randn(rows, n).to(device, dtype)
    bias = torch.randn(e, n).to(device, dtype) if n % 3 else None
    offs = offs.to(device)
    result = gemm(products, a, packed, offs, state, bias)
    assert result.shape == (rows, n) and result.dtype == dtype and result.device == a.device
    assert_products(result, a, weight.transpose(0, 2, 1), offs, bias, loose, by_torch)
    result = dgrad(products, grad, packed, offs.int(), state)
    assert result.shape == (rows, k) and result.dtype == dtype and result.device == a.device
    assert_products(result, grad, weight, offs, None, loose, by_torch)


# --- against the specification ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("e", "n", "k", "blocksize"), SHAPES)
def test_products(device, gpu_kernels, e, n, k, blocksize, draw, dtype):
    torch.manual_seed(e + n)
    offs, nested = DRAWS[draw](e), (k + len(draw)) % 2 == 0
    check_both(ops, (e, n, k), blocksize, nested, dtype, device, offs, loose=gpu_kernels)


@pytest.mark.parametrize("draw", DRAWS)
def test_plain_products(device, draw):
    for i, (e, n, k, blocksize) in enumerate(SHAPES):
        dtype, offs = DTYPES[i % 3], DRAWS[draw](e)
        nested, by_torch = i % 2 == 0, device == "cuda"
        check_both(plain, (e, n, k), blocksize, nested, dtype, device, offs, by_torch=by_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("e", "n", "k", "blocksize"), SHAPES)
def test_products_on_every_instruction_set(cpu_isa, e, n, k, blocksize, dtype):
    offs = DRAWS["all kinds"](e)
    check_both(ops, (e, n, k), blocksize, k % 2 == 0, dtype, "cpu", offs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
@pytest.mark.parametrize(("n", "k", "blocksize"), [(72, 64, 64), (136, 192, 32), (9, 100, 128)])
def test_products_of_many_rows(device, gpu_kernels, n, k, blocksize, nested, dtype):
    """Several tiles of rows in a group, of one and of all."""
    offs = torch.tensor([130, 130, 131, 259, 300])
    settings = {"rows": 310, "loose": gpu_kernels, "by_torch": device == "cuda"}
    check_both(ops, (5, n, k), blocksize, nested, dtype, device, offs, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
@pytest.mark.parametrize("ends", [(700, 700, 1500), (3, 400, 401)], ids=["even", "uneven"])
def test_products_of_hundreds_of_rows(device, gpu_kernels, ends, nested, dtype):
    """Large tiles, of which the device finds out how many there are; some are cut along k."""
    offs = torch.tensor(ends)
    settings = {"rows": ends[-1] + 10, "loose": gpu_kernels, "by_torch": device == "cuda"}
    check_both(ops, (3, 200, 1088), 64, nested, dtype, device, offs, **settings)


def test_ends_out_of_order_do_no_harm(device):
    """A device's ends cannot be checked: results are bad, but the products after them are not."""
    if device != "cuda":
        pytest.skip("elsewhere they are checked")
    packed, state, _ = make_weight((4, 200, 320), 64, "nf4", device=device)
    a = torch.randn(800, 320, device=device, dtype=torch.bfloat16)
    good = torch.tensor([100, 400, 400, 800], device=device)
    want = gemm(ops, a, packed, good, state)
    for ends in ([800, 0, 800, 0], [-5, 2000, 7, 9], [800, 800, 800, 100]):
        bad = gemm(ops, a, packed, torch.tensor(ends, device=device), state)
        assert bad.shape == want.shape
    assert torch.equal(gemm(ops, a, packed, good, state), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_products_of_many_groups(device, gpu_kernels, dtype):
    """More than a block of threads counts."""
    offs = DRAWS["all kinds"](520)
    check_both(ops, (520, 32, 64), 64, False, dtype, device, offs, loose=gpu_kernels)


def test_a_group_is_a_product_of_its_own(cpu_isa):
    """To the last bit: how a weight lies among others changes no sum."""
    shape, offs = (4, 70, 320), torch.tensor([3, 3, 20, 23])
    packed, state, _ = make_weight(shape, 64, "nf4")
    a, grad = torch.randn(23, 320).bfloat16(), torch.randn(23, 70).bfloat16()
    forward, backward = (f(ops, x, packed, offs, state) for f, x in ((gemm, a), (dgrad, grad)))
    size = 70 * 320
    for i, rows in enumerate([slice(0, 3), slice(3, 3), slice(3, 20), slice(20, 23)]):
        codes = packed[i * size // 2 : (i + 1) * size // 2]
        scales = state.absmax[i * size // 64 : (i + 1) * size // 64]
        weight = (codes, shape[1:], scales, 64, "nf4")
        assert torch.equal(forward[rows], ops.gemm_4bit(a[rows], *weight))
        assert torch.equal(backward[rows], ops.gemm_4bit_dgrad(grad[rows], *weight))


def test_results_are_those_of_any_number_of_threads(cpu_isa):
    offs = torch.tensor([1, 1, 30, 31, 37])
    packed, state, _ = make_weight((5, 389, 130), 64, "nf4")
    a, grad = torch.randn(37, 130).bfloat16(), torch.randn(37, 389).bfloat16()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                (gemm(ops, a, packed, offs, state), dgrad(ops, grad, packed, offs, state))
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


# --- layouts, sizes, arguments ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_in_any_strides(device, products, layout):
    packed, state, weight = make_weight((3, 6, 96), 64, "nf4", device=device)
    a = LAYOUTS[layout](torch.randn(7, 96, device=device))
    grad = LAYOUTS[layout](torch.randn(7, 6, device=device))
    bias = torch.randn(6, 3, device=device).t()
    offs = torch.tensor([[2, 0], [2, 0], [6, 0]], device=device)[:, 0]
    result = gemm(products, a, packed, offs, state, bias)
    assert result.is_contiguous()
    assert_products(result, a, weight.transpose(0, 2, 1), offs, bias)
    result = dgrad(products, grad, packed, offs, state)
    assert result.is_contiguous()
    assert_products(result, grad, weight, offs)


@pytest.mark.parametrize("storage", [torch.int8, torch.bfloat16, torch.float32], ids=name_of)
def test_codes_in_any_storage(device, products, storage):
    packed, state, weight = make_weight((3, 6, 96), 64, "fp4", device=device)
    a, offs = torch.randn(4, 96, device=device), torch.tensor([1, 1, 4], device=device)
    stored = packed.flatten().view(storage).view(-1, 1)
    for codes in (stored, stored.t()):
        result = gemm(products, a, codes, offs, state)
        assert_products(result, a, weight.transpose(0, 2, 1), offs)


@pytest.mark.parametrize(
    ("m", "e", "n", "k"), [(0, 2, 5, 64), (3, 2, 0, 64), (3, 2, 5, 0), (3, 0, 5, 64), (0, 0, 0, 0)]
)
def test_empty_operands(device, products, m, e, n, k):
    packed, state = F.quantize_4bit(torch.zeros(e, n, k, device=device), quant_type="nf4")
    bias = torch.arange(float(e * n), device=device).view(e, n)
    offs = torch.arange(1, e + 1, device=device)[: e if m else 0]
    offs = offs if m else torch.zeros(e, dtype=torch.int64, device=device)
    result = gemm(products, torch.ones(m, k, device=device), packed, offs, state, bias)
    expected = torch.zeros(m, n, device=device)
    expected[: min(m, e)] = bias[:m]
    assert torch.equal(result, expected)
    result = dgrad(products, torch.ones(m, n, device=device), packed, offs, state)
    assert torch.equal(result, torch.zeros(m, k, device=device))


def test_errors_are_sentences(device, products):
    packed, state, _ = make_weight((3, 6, 96), 64, "nf4", device=device)
    a, grad = torch.ones(4, 96, device=device), torch.ones(4, 6, device=device)
    offs = torch.tensor([1, 1, 4], device=device)
    (_, absmax, *rest), _ = weight_arguments(state, packed.device)
    bias = torch.ones(3, 6, device=device)
    for name, operand, function in (
        ("A", a, products.grouped_gemm_4bit),
        ("grad", grad, products.grouped_gemm_4bit_dgrad),
    ):
        op = function.__name__ if products is plain else str(function).split(".")[-1]
        good = {"operand": operand, "offs": offs, "shape": (3, 6, 96)}
        cases = [
            ({"operand": operand[0]}, f"{name} must be 2-D"),
            ({"operand": operand[:, :5]}, rf"{name} must be .*\[\.\.\., {operand.shape[1]}\]"),
            ({"operand": operand.double()}, f"{name} must be"),
            ({"offs": offs.float()}, "offs must be int32 or int64"),
            ({"offs": offs[:2]}, r"offs must be of shape \[3\]"),
            ({"offs": offs.view(1, 3)}, r"offs must be of shape \[3\]"),
            ({"shape": (18, 96)}, r"shapeB must be three sizes \[E, N, K\]"),
            ({"shape": (4, 6, 96), "offs": torch.ones(4, device=device).int()}, "B must"),
        ]
        for change, message in cases:
            x, ends, shape = {**good, **change}.values()
            with pytest.raises((ValueError, RuntimeError), match=f"^{op}: {message}"):
                function(x, packed, ends, shape, absmax, *rest)
    for wrong in (bias[:2], bias[0], bias.half()):
        with pytest.raises((ValueError, RuntimeError), match=r"^grouped_gemm_4bit: bias must"):
            products.grouped_gemm_4bit(a, packed, offs, (3, 6, 96), absmax, *rest, wrong)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("ends", [(2, 1, 4), (-1, 1, 4), (1, 2, 5), (1, 2, 2**40)])
def test_ends_that_do_not_ascend(products, ends):
    packed, state, _ = make_weight((3, 6, 96), 64, "nf4")
    message = "offs must be ascending from 0 to at most 4, got"
    for function, x in ((gemm, torch.ones(4, 96)), (dgrad, torch.ones(4, 6))):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(products, x, packed, torch.tensor(ends), state)


@pytest.mark.parametrize("ends", [(2, 1, 4), (-(2**40), 1, 4), (1, 2, 2**40), (4, 0, 0)])
def test_ends_that_do_not_ascend_on_a_gpu_stay_inside(device, gpu_kernels, ends):
    """The result means nothing; that memory of others is left alone is for sanitizers to see."""
    if not gpu_kernels:
        pytest.skip("no kernels of a GPU")
    packed, state, _ = make_weight((3, 6, 96), 64, "nf4", device=device)
    for function, x in ((gemm, torch.ones(40, 96)), (dgrad, torch.ones(40, 6))):
        result = function(ops, x.to(device), packed, torch.tensor(ends, device=device), state)
        assert result.shape[0] == 40
