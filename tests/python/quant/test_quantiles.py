# SPDX-License-Identifier: MIT
"""Quantiles against sorting, maps made of them, and histograms in two dimensions."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitsandbytes.functional as F
from bitsandbytes.plain import quantiles as plain
from reference import codes as reference

ops = torch.ops.bitsandbytes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["dispatched", "plain"])
def estimate(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain.estimate_quantiles if request.param == "plain" else ops.estimate_quantiles


DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n),
    "uniform": lambda n: torch.rand(n),
    "cauchy": lambda n: torch.distributions.Cauchy(0.0, 1.0).sample((n,)),
    "constant": lambda n: torch.full((n,), -1.37),
    "zeros": lambda n: torch.zeros(n),
    "rectified": lambda n: torch.randn(n).relu(),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float(),
    "narrow": lambda n: 1 + 1e-4 * torch.randn(n),
    "all magnitudes": lambda n: torch.randn(n) * torch.rand(n).mul(250).sub(125).exp2(),
    "ascending": lambda n: torch.arange(n).float(),
}


def check(estimate, device, a, offset):
    got = estimate(a.to(device), offset)
    assert got.dtype == torch.float32 and got.shape == (256,) and got.device.type == device
    want = reference.quantiles(a.float().numpy(), offset)
    np.testing.assert_array_equal(got.cpu().numpy(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_elements_in_ascending_order(estimate, device, dtype, name):
    check(estimate, device, DISTRIBUTIONS[name](100_003).to(dtype), 1 / 512)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    offset=st.one_of(st.sampled_from([0.0, 1 / 512, 0.5]), st.floats(0, 0.5)),
    special=st.lists(st.sampled_from([NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45]), max_size=9),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "offset"]),
    seed=st.integers(0, 2**16),
)
def test_any_size_value_and_layout(estimate, device, n, dtype, name, offset, special, layout, seed):
    torch.manual_seed(seed)
    a = DISTRIBUTIONS[name](n)
    for value in special:
        a[torch.randint(n, ())] = value
    a = a.to(dtype)
    if layout == "transposed" and n % 2 == 0:
        a = a.view(2, -1).t()
    elif layout == "strided":
        a = torch.stack((a, a * 3), 1)[:, 0]
    elif layout == "offset":
        a = torch.cat((a[:1], a))[1:]
    check(estimate, device, a, offset)


def test_more_elements_than_threads_share(device):
    # Several pieces on a CPU, several tiles per block of threads on a GPU.
    check(ops.estimate_quantiles, device, torch.randn(3_000_001), 1 / 512)


def test_nan_is_the_greatest(estimate, device):
    a = torch.arange(256.0)
    a[3] = NAN
    a[7] = -NAN
    got = estimate(a.to(device), 0.0)
    assert got[-2:].isnan().all() and not got[:-2].isnan().any()
    assert got[253] == 255


def test_equals_the_public_function_for_one_block():
    # The public package: sorted[round((offset + k (1 - 2 offset) / 255) (n - 1))] for n <= 4096.
    a = torch.randn(4096)
    k = torch.arange(256, dtype=torch.float64)
    places = ((1 / 512 + k * (1 - 2 / 512) / 255) * 4095 + 0.5).floor().long()
    assert torch.equal(F.estimate_quantiles(a), a.sort().values[places])


@pytest.mark.parametrize(
    ("name", "n"), [("normal", 2**20), ("uniform", 2**20), ("heavy-tailed", 2**20)]
)
def test_close_to_interpolated_quantiles(device, name, n):
    if name == "heavy-tailed":
        a = torch.distributions.StudentT(3.0).sample((n,))
    else:
        a = DISTRIBUTIONS[name](n)
    q = torch.linspace(1 / 512, 511 / 512, 256, dtype=torch.float64)
    want = torch.quantile(a.double(), q)
    got = F.estimate_quantiles(a.to(device)).cpu()
    # 1e-3, and a gap between elements where they are rare.
    assert ((got - want).abs() <= 1e-3 * want.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_acceptance(device, dtype):
    # The public package's bounds.
    a = torch.rand(1024, 1024, device=device).to(dtype)
    want = torch.linspace(1 / 512, 511 / 512, 256, device=device)
    got = F.estimate_quantiles(a)
    assert ((got - want).abs() <= 1e-3 + 1e-2 * want).all()
    a = torch.randn(1024, 1024, device=device).to(dtype)
    want = torch.quantile(a.float(), torch.linspace(1 / 512, 511 / 512, 256, device=device))
    assert (F.estimate_quantiles(a) - want).abs().max() < 5e-2


@pytest.mark.parametrize("count", [1, 2, 3, 16, 100, 127, 255, 256])
def test_fewer_quantiles(device, count):
    a = torch.randn(10_000, device=device)
    got = F.estimate_quantiles(a, num_quantiles=count)
    offset = 1 / 512 if count == 256 else 1 / (2 * count)
    every = F.estimate_quantiles(a, offset=offset)
    assert torch.equal(got, every[torch.linspace(0, 255, count).long().to(device)])
    chosen = F.estimate_quantiles(a, offset=0.1, num_quantiles=count)
    every = F.estimate_quantiles(a, offset=0.1)
    assert torch.equal(chosen, every[torch.linspace(0, 255, count).long().to(device)])


def test_given_tensor(device):
    a = torch.randn(1000, device=device)
    out = torch.zeros(256, device=device)
    assert F.estimate_quantiles(a, out) is out
    assert torch.equal(out, F.estimate_quantiles(a))
    few = F.estimate_quantiles(a, out, num_quantiles=2)
    assert few.shape == (2,) and torch.equal(out, F.estimate_quantiles(a, offset=0.25))


ONES = torch.ones(300)
BAD = [
    (NotImplementedError, "A", (ONES.double(),)),
    (NotImplementedError, "A", (ONES.int(),)),
    (NotImplementedError, "A", (ONES[:255],)),
    (NotImplementedError, "num_quantiles", (ONES, None, 0.1, 257)),
    (ValueError, "num_quantiles", (ONES, None, 0.1, 0)),
    (ValueError, "offset", (ONES, None, -0.1)),
    (ValueError, "offset", (ONES, None, 0.6)),
    (ValueError, "offset", (ONES, None, NAN)),
    (ValueError, "out", (ONES, ONES[:255].clone())),
    (ValueError, "out", (ONES, ONES[:256].double())),
]


@pytest.mark.parametrize(("error", "argument", "args"), BAD)
def test_bad_argument_gets_a_sentence(error, argument, args):
    with pytest.raises(error, match=rf"^estimate_quantiles: .*\b{argument} .*, got "):
        F.estimate_quantiles(*args)


@pytest.mark.parametrize(
    ("argument", "args"),
    [
        ("A", (ONES.double(), 0.1)),
        ("A", (ONES[:0], 0.1)),
        ("offset", (ONES, 0.51)),
        ("offset", (ONES, NAN)),
    ],
)
def test_bad_argument_of_the_op_gets_a_sentence(estimate, device, argument, args):
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"^estimate_quantiles: .*\b{argument} .*, got "
    ):
        estimate(args[0].to(device), args[1])


def test_compiles_into_one_graph(device):
    def create(x):
        return F.create_quantile_map(x) * 2

    x = torch.randn(1000, device=device)
    compiled = torch.compile(create, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), create(x))


# --- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantile_map(device, bits):
    a = torch.randn(100_000, device=device)
    code = F.create_quantile_map(a, bits)
    assert code.shape == (256,) and code.device == a.device
    assert (code.diff() >= 0).all() and code.abs().max() == 1 and (code == 0).any()
    quantiles = F.estimate_quantiles(a, num_quantiles=2**bits - 1)
    levels = torch.cat((quantiles, quantiles.new_zeros(257 - 2**bits))).sort().values
    assert torch.equal(code, levels / levels.abs().max())


def test_quantile_map_of_zeros(device):
    assert not F.create_quantile_map(torch.zeros(300, device=device)).any()


def test_error_of_a_quantile_map(device):
    # The public package's bounds on the error of a round trip.
    for a, mean, most in (
        (torch.randn(1024, 1024, device=device), 0.0075, None),
        (torch.rand(1024, 1024, device=device), 0.001, 5e-3),
    ):
        code = F.estimate_quantiles(a)
        error = (F.dequantize_no_absmax(F.quantize_no_absmax(a, code), code) - a).abs()
        assert error.mean() < mean
        assert most is None or error.max() < most


@pytest.mark.parametrize("bits", [0, 9])
def test_quantile_map_of_other_bits(bits):
    with pytest.raises(ValueError, match=rf"total_bits must be 1 to 8, got {bits}"):
        F.create_quantile_map(ONES, bits)


# --- histograms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (5, 70), (70, 5), (1, 1)])
def test_histogram(device, shape):
    n = 20_000
    rows = torch.randint(0, shape[0], (n,), dtype=torch.int32)
    columns = torch.randint(0, shape[1], (n,), dtype=torch.int32)
    source = torch.rand(n)
    histogram = torch.rand(shape)
    want = histogram.double().numpy()
    np.add.at(want, (rows.numpy(), columns.numpy()), source.numpy())
    got = histogram.to(device)
    before = got.data_ptr()
    arguments = [t.to(device) for t in (rows, columns, source)]
    assert F.histogram_scatter_add_2d(got, *arguments) is None
    assert got.data_ptr() == before
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=1e-4)
    again = histogram.to(device)
    F.histogram_scatter_add_2d(again, *arguments)
    assert torch.equal(again, got)


def test_histogram_leaves_out_what_lies_outside(device):
    big = 2**31 - 1
    index1 = torch.tensor([0, -1, 3, 2, 2, -big - 1, big], dtype=torch.int32, device=device)
    index2 = torch.tensor([0, 0, 0, 4, 3, big, -1], dtype=torch.int32, device=device)
    source = torch.tensor([1, NAN, NAN, INF, 2, NAN, NAN], device=device)
    memory = torch.full((5, 4), 7.0, device=device)
    F.histogram_scatter_add_2d(memory[1:4], index1, index2, source)
    want = torch.full((5, 4), 7.0)
    want[1, 0], want[3, 3] = 8, 9
    assert torch.equal(memory.cpu(), want)


def test_histogram_of_any_strides_and_sizes(device):
    histogram = torch.zeros(4, 3, device=device).t()
    index = torch.tensor([[0, 2], [1, 2]], dtype=torch.int32, device=device)
    F.histogram_scatter_add_2d(histogram, index, index.t(), torch.ones(2, 2, device=device))
    want = torch.zeros(3, 4)
    want[0, 0] = want[2, 1] = want[1, 2] = want[2, 2] = 1
    assert torch.equal(histogram.cpu(), want)
    empty = index.view(-1)[:0]
    F.histogram_scatter_add_2d(histogram, empty, empty, torch.ones(0, device=device))
    F.histogram_scatter_add_2d(histogram[:0], index, index, torch.ones(2, 2, device=device))
    assert torch.equal(histogram.cpu(), want)


INDEX = torch.zeros(3, dtype=torch.int32)
BAD_HISTOGRAMS = [
    ("histogram", (torch.zeros(4), INDEX, INDEX, torch.ones(3))),
    ("histogram", (torch.zeros(4, 4).half(), INDEX, INDEX, torch.ones(3))),
    ("index1", (torch.zeros(4, 4), INDEX.long(), INDEX, torch.ones(3))),
    ("index2", (torch.zeros(4, 4), INDEX, INDEX[:2], torch.ones(3))),
    ("source", (torch.zeros(4, 4), INDEX, INDEX, torch.ones(3).double())),
]


@pytest.mark.parametrize(("argument", "args"), BAD_HISTOGRAMS)
def test_bad_histogram_gets_a_sentence(argument, args):
    with pytest.raises(
        AssertionError, match=rf"^histogram_scatter_add_2d: {argument} must be .*, got "
    ):
        F.histogram_scatter_add_2d(*args)
    assert not args[0].any()
