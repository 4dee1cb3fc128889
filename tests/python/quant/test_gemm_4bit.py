# SPDX-License-Identifier: MIT
"""Products with a 4-bit weight: against their specification, and against products of bfloat16."""

import numpy as np
import pytest
import torch
from products4 import assert_product, make_weight
from quant_inputs import DTYPES, LAYOUTS, name_of, numpy

import bitsandbytes.functional as F
from bitsandbytes.plain import gemm_4bit as plain
from bitsandbytes.quant.scales import weight_arguments

ops = torch.ops.bitsandbytes
TYPES = ("nf4", "fp4")
# N, K and blocksize: rows that begin in the middle of bytes, of blocks and of what kernels read at
# once; blocks longer than rows; more rows than a thread takes at a time; what fits tensor cores.
SHAPES = (
    (1, 1, 32),
    (7, 33, 32),
    (2, 7, 64),
    (33, 65, 64),
    (5, 96, 64),
    (65, 64, 32),
    (66, 192, 4096),
    (4, 320, 128),
    (130, 160, 32),
    (3, 2048, 64),
    (9, 4097, 256),
    (6, 4224, 128),
    (70, 512, 64),
    (40, 576, 256),
    (21, 2304, 64),
)
ROWS = (1, 2, 4, 5, 11, 20)


@pytest.fixture(params=["dispatched", "plain"])
def products(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain if request.param == "plain" else ops


def gemm(products, a, packed, state, bias=None):
    weight, nested = weight_arguments(state, packed.device)
    return products.gemm_4bit(a, packed, *weight, bias, *nested)


def dgrad(products, grad, packed, state):
    weight, nested = weight_arguments(state, packed.device)
    return products.gemm_4bit_dgrad(grad, packed, *weight, *nested)


def check_both(
    products,
    shape,
    blocksize,
    quant_type,
    nested,
    dtype,
    device,
    rows=ROWS,
    loose=False,
    by_torch=False,
):
    n, k = shape
    rounded = torch.float32 if loose else dtype
    packed, state, weight = make_weight(shape, blocksize, quant_type, nested, rounded, device)
    for m in rows:
        a = torch.randn(m, k).to(device, dtype)
        grad = torch.randn(m, n).to(device, dtype)
        bias = torch.randn(n).to(device, dtype) if m % 2 else None
        result = gemm(products, a, packed, state, bias)
        assert result.shape == (m, n) and result.dtype == dtype and result.device == a.device
        assert_product(result, numpy(a), weight.T, bias, loose, by_torch)
        result = dgrad(products, grad, packed, state)
        assert result.shape == (m, k) and result.dtype == dtype and result.device == a.device
        assert_product(result, numpy(grad), weight, None, loose, by_torch)


# --- against the specification ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
@pytest.mark.parametrize(("n", "k", "blocksize"), SHAPES)
def test_products(device, gpu_kernels, n, k, blocksize, nested, dtype):
    kind = TYPES[n % 2]
    check_both(ops, (n, k), blocksize, kind, nested, dtype, device, loose=gpu_kernels)


# N, K, blocksize and rows that the kernels for tensor cores take: parts of their tiles, one and
# several of them in each direction, sums of one block of threads and of many.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
@pytest.mark.parametrize(
    ("n", "k", "blocksize", "rows"),
    [
        (72, 64, 64, (1, 130)),
        (1032, 192, 32, (5, 70)),
        (520, 320, 128, (17, 64)),
        (264, 448, 256, (33, 257)),
        (136, 384, 64, (128,)),
        (776, 128, 4096, (16, 20)),
        # Tiles that two, four and eight blocks of threads of 132 share evenly.
        (264, 4096, 64, (50, 100, 256, 500)),
        (520, 2048, 128, (200,)),
    ],
)
def test_backward_products_in_tiles(device, gpu_kernels, n, k, blocksize, rows, nested, dtype):
    rounded = torch.float32 if gpu_kernels else dtype
    kind = TYPES[k % 3 % 2]
    packed, state, weight = make_weight((n, k), blocksize, kind, nested, rounded, device)
    for m in rows:
        grad = torch.randn(m, n).to(device, dtype)
        result = dgrad(ops, grad, packed, state)
        assert_product(result, numpy(grad), weight, None, gpu_kernels)
        assert torch.equal(result, dgrad(ops, grad, packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("n", "k", "blocksize"), SHAPES)
def test_products_on_every_instruction_set(cpu_isa, n, k, blocksize, dtype):
    check_both(ops, (n, k), blocksize, TYPES[k % 2], n % 2 == 0, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_products_of_many_rows_on_every_instruction_set(cpu_isa, dtype):
    """More rows than one block of sums, and a block that is cut in tiles of two heights."""
    for shape, blocksize in (((3, 128), 64), ((5, 65), 32)):
        check_both(ops, shape, blocksize, "nf4", False, dtype, "cpu", (64, 255, 257, 519))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"),
    [
        (72, 256, 64),
        (35, 192, 64),
        (8, 128, 128),
        (390, 1088, 64),
        # of which two, four, and eight of a GPU's blocks of threads have parts
        (136, 512, 64),
        (72, 1024, 64),
        (40, 2048, 128),
    ],
)
def test_products_of_many_rows(device, gpu_kernels, n, k, blocksize, nested, dtype):
    """Every number of rows for which a GPU has a kernel of its own, and one more."""
    rows = (9, 17, 33, 65, 129, 193, 257)
    kind = TYPES[n % 2]
    check_both(ops, (n, k), blocksize, kind, nested, dtype, device, rows, loose=gpu_kernels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
@pytest.mark.parametrize(
    ("n", "k", "blocksize"), [(56, 8448, 64), (24, 16704, 64), (40, 8512, 128)]
)
def test_products_of_few_long_rows(device, gpu_kernels, n, k, blocksize, nested, dtype):
    """Of more elements than a GPU's block of threads holds at once; the same bits every time."""
    kind = TYPES[n % 3 % 2]
    rounded = torch.float32 if gpu_kernels else dtype
    packed, state, weight = make_weight((n, k), blocksize, kind, nested, rounded, device)
    for m in (1, 8, 12):
        a = torch.randn(m, k).to(device, dtype)
        bias = torch.randn(n).to(device, dtype)
        result = gemm(ops, a, packed, state, bias)
        assert_product(result, numpy(a), weight.T, bias, gpu_kernels)
        assert torch.equal(result, gemm(ops, a, packed, state, bias))


@pytest.mark.parametrize("nested", [False, True], ids=["plain scales", "nested scales"])
def test_products_that_kernels_leave_to_plain_pytorch(device, gpu_kernels, nested):
    # float32 has no tensor cores, and these are more rows than kernels without them are for.
    packed, state, _ = make_weight((9, 64), 64, "nf4", nested, device=device)
    (shape, scales, *rest), codes = weight_arguments(state, packed.device)
    weight = (packed, shape, scales, *rest)
    a, grad = torch.randn(300, 64, device=device), torch.randn(300, 9, device=device)
    forward = (ops.gemm_4bit(a, *weight, None, *codes), plain.gemm_4bit(a, *weight, None, *codes))
    backward = (
        ops.gemm_4bit_dgrad(grad, *weight, *codes),
        plain.gemm_4bit_dgrad(grad, *weight, *codes),
    )
    for result, expected in (forward, backward):
        torch.testing.assert_close(result, expected)
        if gpu_kernels:
            assert torch.equal(result, expected)


@pytest.mark.parametrize("piece", [1, 500])
def test_plain_products_in_pieces(device, monkeypatch, piece):
    """As of a weight that is too large to be dequantized at once."""
    monkeypatch.setattr(plain, "PIECE", piece)
    settings = {"rows": (1, 3), "by_torch": device == "cuda"}
    for dtype in DTYPES:
        for n, k, blocksize in SHAPES[:9]:
            nested = n % 2 == 0
            check_both(plain, (n, k), blocksize, "nf4", nested, dtype, device, **settings)


@pytest.mark.parametrize(
    ("dtype", "m"),
    [
        *((torch.bfloat16, m) for m in (*range(1, 21), 64, 100, 257)),
        *((torch.float16, m) for m in (100, 192, 257)),
    ],
    ids=lambda value: name_of(value) if isinstance(value, torch.dtype) else f"{value} rows",
)
def test_error_is_at_most_that_of_a_product_in_the_same_dtype(device, gpu_kernels, dtype, m):
    """The rounding of the result is all there is; torch's own sums are no better.

    On a GPU, the rounding of the weight is no worse either.
    """
    shape = (257, 1152)
    rounded = torch.float32 if gpu_kernels else dtype
    packed, state, weight = make_weight(shape, 64, "nf4", False, rounded, device)
    values = torch.from_numpy(weight).to(device)
    a, grad = (torch.randn(m, size, device=device).to(dtype) for size in reversed(shape))
    for result, dense, exact in (
        (gemm(ops, a, packed, state), a @ values.to(dtype).t(), a.double() @ values.t()),
        (dgrad(ops, grad, packed, state), grad @ values.to(dtype), grad.double() @ values),
    ):
        error, dense_error = ((r.double() - exact).square().mean().sqrt() for r in (result, dense))
        assert error <= dense_error * (1.005 if gpu_kernels else 1.001)


def test_results_are_those_of_any_number_of_threads(cpu_isa):
    packed, state, _ = make_weight((389, 640), 64, "nf4")
    a, grad = torch.randn(37, 640).bfloat16(), torch.randn(37, 389).bfloat16()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((gemm(ops, a, packed, state), dgrad(ops, grad, packed, state)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


def test_rows_are_the_same_alone_and_among_others(cpu_isa):
    """How many rows there are does not change the order of a sum."""
    packed, state, _ = make_weight((70, 2112), 64, "nf4")
    a = torch.randn(23, 2112).half()
    together = gemm(ops, a, packed, state)
    for i in range(23):
        assert torch.equal(gemm(ops, a[i], packed, state), together[i])


@pytest.mark.parametrize("k", [7, 32, 96, 128, 160, 192, 1000, 2080])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(device, products, k, value):
    n = 7
    for dtype in DTYPES:
        packed, state, _ = make_weight((n, k), 32, "nf4")
        packed = packed.fill_(0x00).to(device)  # every code is that of -1
        for row in (0, 3, n - 1):
            absmax = torch.ones_like(state.absmax).to(device)
            first, last = -(-row * k // 32), -(-(row + 1) * k // 32)  # blocks that begin in the row
            absmax[first:last] = value
            a = torch.ones(2, k, dtype=dtype, device=device)
            result = products.gemm_4bit(a, packed, (n, k), absmax, 32, "nf4")
            scales = absmax.repeat_interleave(32)[: n * k].view(n, k)
            assert torch.equal(result.isfinite(), scales.isfinite().all(1).expand(2, n))


# --- layouts, storages, scales ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_in_any_strides_and_shape(device, products, layout):
    packed, state, weight = make_weight((6, 96), 64, "nf4", device=device)
    a = LAYOUTS[layout](torch.randn(2, 3, 96, device=device))
    grad = LAYOUTS[layout](torch.randn(2, 3, 6, device=device))
    bias = torch.randn(12, device=device)[::2]
    result = gemm(products, a, packed, state, bias)
    assert result.shape == (2, 3, 6) and result.is_contiguous()
    assert_product(result, numpy(a).reshape(6, 96), weight.T, bias)
    result = dgrad(products, grad, packed, state)
    assert result.shape == (2, 3, 96) and result.is_contiguous()
    assert_product(result, numpy(grad).reshape(6, 6), weight)


@pytest.mark.parametrize("offset", [2, 4, 8])
def test_rows_that_begin_anywhere(device, gpu_kernels, offset):
    """On a GPU, rows off multiples of 16 bytes are for other kernels than the others."""
    n, k = 200, 448
    rounded = torch.float32 if gpu_kernels else torch.bfloat16
    packed, state, weight = make_weight((n, k), 64, "nf4", False, rounded, device)
    for m in (9, 30, 61):
        memory = torch.randn(m * k + offset).to(device, torch.bfloat16)
        a = memory[offset:].view(m, k)
        assert_product(gemm(ops, a, packed, state), numpy(a), weight.T, None, gpu_kernels)


@pytest.mark.parametrize(
    "storage", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32], ids=name_of
)
def test_codes_in_any_storage(device, products, storage):
    packed, state, weight = make_weight((6, 96), 64, "fp4", device=device)
    a = torch.randn(4, 96, device=device)
    stored = packed.flatten().view(storage).view(-1, 1)
    assert_product(gemm(products, a, stored, state), numpy(a), weight.T)
    assert_product(gemm(products, a, stored.t(), state), numpy(a), weight.T)
    assert_product(products.gemv_4bit(a, stored, *gemv_arguments(state)), numpy(a), weight.T)


def gemv_arguments(state):
    return state.shape, state.absmax, state.code, state.blocksize


def test_gemv_takes_any_table(device, products):
    for k in (7, 192):
        packed, state, _ = make_weight((5, k), 64, "nf4", device=device)
        code = torch.linspace(2, -1, 16, device=device)
        codes = numpy(packed).reshape(-1)
        scales = np.repeat(numpy(state.absmax), 64)[: 5 * k]
        nibbles = np.stack([codes >> 4, codes & 15], 1).reshape(-1)[: 5 * k]
        weight = (numpy(code)[nibbles] * scales).reshape(5, k)
        a = torch.randn(3, k, device=device)
        shape, absmax, _, blocksize = gemv_arguments(state)
        result = products.gemv_4bit(a, packed, shape, absmax, code, blocksize)
        assert_product(result, numpy(a), weight.T)
        out = torch.full((3, 5), -1.0, device=device)
        arguments = (a, packed, shape, absmax, code, blocksize, out)
        (plain.gemv_4bit_out if products is plain else ops.gemv_4bit.out)(*arguments)
        assert torch.equal(out, result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
def test_offset_of_another_dtype(device, products, dtype):
    packed, state, _ = make_weight((4, 64), 64, "nf4", True, device=device)
    state.offset = state.offset.to(dtype)
    (shape, absmax, blocksize, quant_type), (codes, code, _) = weight_arguments(state, device)
    a = torch.randn(2, 64, device=device)
    result = products.gemm_4bit(
        a, packed, shape, absmax, blocksize, quant_type, None, codes, code, state.offset
    )
    assert torch.equal(result, gemm(products, a, packed, state))


def test_identity_is_exact(device, products):
    for dtype in DTYPES:
        packed, state = F.quantize_4bit(torch.eye(256, device=device).to(dtype), quant_type="nf4")
        a = torch.randn(3, 256, device=device).to(dtype)
        assert torch.equal(gemm(products, a, packed, state), a)
        assert torch.equal(dgrad(products, a, packed, state), a)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 64), (3, 0, 64), (3, 5, 0), (0, 0, 0)])
def test_empty_operands(device, products, m, n, k):
    packed, state = F.quantize_4bit(torch.zeros(n, k, device=device), quant_type="nf4")
    bias = torch.arange(float(n), device=device)
    result = gemm(products, torch.ones(m, k, device=device), packed, state, bias)
    assert torch.equal(result, bias.expand(m, n))
    result = dgrad(products, torch.ones(m, n, device=device), packed, state)
    assert torch.equal(result, torch.zeros(m, k, device=device))
    code = state.code
    a = torch.ones(m, k, device=device)
    result = products.gemv_4bit(a, packed, (n, k), state.absmax, code, 64)
    assert torch.equal(result, torch.zeros(m, n, device=device))


def test_autocast_changes_nothing(device, products):
    packed, state, weight = make_weight((5, 96), 64, "nf4", device=device)
    a, grad = torch.randn(2, 96, device=device), torch.randn(2, 5, device=device)
    with torch.autocast(device, torch.bfloat16):
        result, grads = gemm(products, a, packed, state), dgrad(products, grad, packed, state)
    assert result.dtype == grads.dtype == torch.float32
    assert_product(result, numpy(a), weight.T)
    assert_product(grads, numpy(grad), weight)


# --- functional.gemv_4bit -----------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_functional_gemv(device, gpu_kernels, nested):
    for dtype in DTYPES:
        rounded = torch.float32 if gpu_kernels else dtype
        packed, state, weight = make_weight((5, 96), 32, "fp4", nested, rounded, device)
        a = torch.randn(2, 3, 96).to(device, dtype)
        result = F.gemv_4bit(a, packed.t(), state=state)
        assert result.shape == (2, 3, 5) and result.dtype == dtype
        assert_product(result, numpy(a).reshape(6, 96), weight.T, loose=gpu_kernels)
        out = torch.empty(2, 5, 3, dtype=dtype, device=device).transpose(1, 2)
        assert F.gemv_4bit(a, packed, out, state=state) is out
        assert torch.equal(out, result)


def test_functional_gemv_takes_scales_in_blocks_of_another_size(device):
    packed, state, _ = make_weight((40, 96), 32, "nf4", device=device)
    a = torch.randn(2, 96, device=device)
    offset = state.absmax.mean()
    codes, inner = F.quantize_blockwise(state.absmax - offset, blocksize=64)
    scales = F.dequantize_blockwise(codes, inner) + offset
    nested = F.QuantState(
        codes, state.shape, state.code, 32, "nf4", torch.float32, offset=offset, state2=inner
    )
    want = ops.gemm_4bit(a, packed, state.shape, scales, 32, "nf4")
    assert torch.equal(F.gemv_4bit(a, packed, state=nested), want)


def test_functional_gemv_errors():
    packed, state, _ = make_weight((5, 96), 32, "fp4")
    a = torch.randn(2, 96)
    with pytest.raises(ValueError, match="gemv_4bit: state must be given, got None"):
        F.gemv_4bit(a, packed)
    flat = F.QuantState(state.absmax, torch.Size([480]), state.code, 32, "fp4", torch.float32)
    with pytest.raises(ValueError, match=r"state must be of a matrix \[N, K\], got \(480,\)"):
        F.gemv_4bit(a, packed, state=flat)
    for out in (torch.zeros(2, 4), torch.zeros(2, 5).half()):
        with pytest.raises(ValueError, match=r"out must be torch.float32 of shape \[2, 5\], got"):
            F.gemv_4bit(a, packed, out, state=state)


# --- compilation --------------------------------------------------------------------------------


def test_compiles_in_one_graph(device, compile_fresh):
    packed, state, _ = make_weight((5, 96), 32, "nf4", True, device=device)
    weight, nested = weight_arguments(state, torch.device(device))

    def run(a, grad):
        forward = ops.gemm_4bit(a * 2, packed, *weight, None, *nested)
        return forward + 1, ops.gemm_4bit_dgrad(grad, packed, *weight, *nested)

    compiled = compile_fresh(run, fullgraph=True, backend="aot_eager")
    for m in (3, 4, 5):  # the second size makes the number of rows a symbol
        a, grad = torch.randn(m, 96, device=device), torch.randn(m, 5, device=device)
        for got, want in zip(compiled(a, grad), run(a, grad), strict=True):
            assert torch.equal(got, want)


def test_runs_in_a_cuda_graph(device):
    if device != "cuda":
        pytest.skip("CUDA graphs exist on CUDA only")
    packed, state, _ = make_weight((70, 512), 64, "nf4", True, device=device)
    for dtype in DTYPES:
        for m in (1, 3, 20, 100):
            a, grad = (torch.zeros(m, size, device=device, dtype=dtype) for size in (512, 70))
            gemm(ops, a, packed, state), dgrad(ops, grad, packed, state)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = gemm(ops, a, packed, state), dgrad(ops, grad, packed, state)
            a.normal_()
            grad.normal_()
            graph.replay()
            assert torch.equal(results[0], gemm(ops, a, packed, state))
            assert torch.equal(results[1], dgrad(ops, grad, packed, state))


# --- errors -------------------------------------------------------------------------------------

GOOD = {
    "A": torch.zeros(2, 96),
    "B": torch.zeros(240, 1, dtype=torch.uint8),
    "shapeB": (5, 96),
    "absmax": torch.zeros(8),
    "blocksize": 64,
    "quant_type": "nf4",
}
NESTED = {
    "absmax": torch.zeros(1),
    "absmax_8bit": torch.zeros(8, dtype=torch.uint8),
    "absmax_code": torch.zeros(256),
    "absmax_offset": torch.tensor(0.0),
}
MISTAKES = {
    "dtype": ({"A": torch.zeros(2, 96).double()}, "A must be"),
    "integers": ({"A": torch.zeros(2, 96).int()}, "A must be"),
    "scalar": ({"A": torch.tensor(0.0)}, "A must"),
    "terms": ({"A": torch.zeros(2, 95)}, r"A must be \[\.\.\., 96\]"),
    "dimensions": ({"shapeB": (480,)}, "shapeB must be two sizes"),
    "negative": ({"shapeB": (-5, 96)}, "shapeB must be two sizes"),
    "codes": ({"B": torch.zeros(239, 1, dtype=torch.uint8)}, "B must"),
    "storage": ({"B": torch.zeros(240, 1, dtype=torch.bool)}, "B must be an integer"),
    "blocksize": ({"blocksize": 48}, "blocksize must be one of"),
    "type": ({"quant_type": "int4"}, "quant_type must be"),
    "scales": ({"absmax": torch.zeros(7)}, "absmax must"),
    "scale dtype": ({"absmax": torch.zeros(8).half()}, "absmax must"),
    "bias": ({"bias": torch.zeros(4)}, "bias must"),
    "bias dtype": ({"bias": torch.zeros(5).half()}, "bias must"),
    "bias shape": ({"bias": torch.zeros(5, 1)}, "bias must"),
    "no code": (NESTED | {"absmax_code": None}, "absmax_code must be given with absmax_8bit"),
    "no offset": (NESTED | {"absmax_offset": None}, "absmax_offset must be given with absmax_8bit"),
    "short codes": (NESTED | {"absmax_8bit": torch.zeros(7).byte()}, "absmax_8bit must"),
    "short table": (NESTED | {"absmax_code": torch.zeros(255)}, "absmax_code must"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_argument(products, mistake):
    changes, message = MISTAKES[mistake]
    arguments = {k: v for k, v in (GOOD | changes).items()}
    with pytest.raises((RuntimeError, ValueError), match="gemm_4bit: " + message):
        products.gemm_4bit(**arguments)


def test_mistakes_of_the_backward_product(products):
    arguments = {k: v for k, v in GOOD.items() if k != "A"} | {"grad": torch.zeros(2, 96)}
    with pytest.raises((RuntimeError, ValueError), match=r"grad must be \[\.\.\., 5\]"):
        products.gemm_4bit_dgrad(**arguments)


def test_mistakes_of_gemv(products):
    a, b, shape, absmax, blocksize = (v for k, v in GOOD.items() if k != "quant_type")
    with pytest.raises((RuntimeError, ValueError), match="gemv_4bit: code must"):
        products.gemv_4bit(a, b, shape, absmax, torch.zeros(15), blocksize)
    out = torch.zeros(2, 4)
    gemv_out = plain.gemv_4bit_out if products is plain else ops.gemv_4bit.out
    with pytest.raises((RuntimeError, ValueError), match="gemv_4bit: out must"):
        gemv_out(a, b, shape, absmax, torch.zeros(16), blocksize, out)


@pytest.mark.parametrize("mistake", ["terms", "dimensions", "blocksize", "type", "bias", "no code"])
def test_mistakes_are_found_while_tracing(mistake):
    changes, _ = MISTAKES[mistake]
    arguments = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in (GOOD | changes).items()}
    with pytest.raises(RuntimeError, match="gemm_4bit: "):
        ops.gemm_4bit(**arguments)
