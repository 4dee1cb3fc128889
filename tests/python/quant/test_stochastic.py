# SPDX-License-Identifier: MIT
"""Stochastic rounding to 8-bit codes: its rule bit for bit, its mean, and its arguments."""

import random

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.plain import quantize as plain
from reference import codes as reference

ops = torch.ops.bitsandbytes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHUFFLED = np.random.default_rng(5).permutation(reference.dynamic_map(True))
TABLES = {
    "dynamic": reference.dynamic_map(True),
    "udynamic": reference.dynamic_map(False),
    "linear": reference.linear_map(True),
    "short": np.array([-1, -0.25, 0, 0.5, 1], np.float32),
    "shuffled": SHUFFLED,
}


@pytest.fixture(params=["dispatched", "plain"])
def blockwise(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain if request.param == "plain" else ops


def numbers(n, dtype):
    a = torch.randn(n) * torch.randn(n).exp2()
    if n > 300:
        a[:70] = 0
        a[200] = float("nan")
        a[290] = float("inf")
    return a.to(dtype)


def check(blockwise, device, a, levels, blocksize, rand, offset):
    codes, absmax = blockwise.quantize_blockwise_stochastic(
        a.to(device),
        torch.from_numpy(levels.copy()).to(device),
        blocksize,
        rand.to(device),
        offset,
    )
    want_absmax, s = reference.scale(a.float().numpy(), blocksize)
    r = rand.numpy()[(np.arange(a.numel()) + offset) % rand.numel()]
    np.testing.assert_array_equal(absmax.cpu().numpy(), want_absmax)
    np.testing.assert_array_equal(codes.cpu().numpy(), reference.round_stochastic(levels, s, r))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("n", "blocksize"), [(5003, 64), (4096, 4096), (31, 32), (0, 64)])
def test_rule(blockwise, device, dtype, name, n, blocksize):
    a = numbers(n, dtype)
    check(blockwise, device, a, TABLES[name], blocksize, torch.rand(1030), 1001)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_on_every_instruction_set(cpu_isa, dtype):
    for name in TABLES:
        check(ops, "cpu", numbers(3001, dtype), TABLES[name], 77, torch.rand(1024), 1023)


@pytest.mark.parametrize("name", ["dynamic", "linear"])
def test_mean_of_many_results_is_the_number(device, name):
    code = torch.from_numpy(TABLES[name].copy()).to(device)
    values = torch.linspace(-0.99, 1, 100, device=device)
    times = 4096
    a = values.repeat(times, 1)
    rand = torch.rand(a.numel(), device=device)
    codes, absmax = ops.quantize_blockwise_stochastic(a, code, 4096, rand, 0)
    assert (absmax == 1).all()
    mean = code[codes.long()].double().mean(0)
    # Standard deviation of a mean: at most half a gap over the root of the count; five of them.
    gap = code.diff().max().item()
    assert ((mean - values).abs() < 5 * gap / 2 / times**0.5).all()
    nearest = code[ops.quantize_blockwise(a[0], code, 4096)[0].long()]
    assert (nearest - values).abs().max() > 5 * gap / 2 / times**0.5  # the bound can tell


def test_levels_stay(blockwise, device):
    for name in ("dynamic", "udynamic", "linear"):
        code = torch.from_numpy(TABLES[name].copy()).to(device)
        a = torch.cat((torch.ones(1, device=device), code))
        for r in (0.0, 1 - 2**-24):
            rand = torch.full((1024,), r, device=device)
            codes, _ = blockwise.quantize_blockwise_stochastic(a, code, 512, rand, 0)
            assert torch.equal(code[codes[1:].long()], code)


def test_acceptance(device):
    # The public package's: at most one code from the nearest, as often above as below.
    a = torch.randn(1024, 1024, device=device)
    nearest, state = F.quantize_blockwise(a)
    codes, stochastic = F.quantize_blockwise(a, rand=torch.rand(1024, device=device))
    assert torch.equal(state.absmax, stochastic.absmax)
    steps = codes.int() - nearest.int()
    assert steps.abs().max() == 1
    up, down = (steps > 0).float().mean().item(), (steps < 0).float().mean().item()
    assert abs(up - down) < 0.01
    assert up > 0.1


def test_start_comes_from_pythons_random(device):
    a, rand = torch.randn(5000, device=device), torch.rand(1024, device=device)
    results = []
    for seed in (1, 1, 2):
        random.seed(seed)
        results.append(F.quantize_blockwise(a, rand=rand)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_nearest_rounding_leaves_pythons_random_alone(device):
    before = random.getstate()
    F.quantize_blockwise(torch.randn(100, device=device))
    assert random.getstate() == before


def test_with_every_other_argument(device):
    a, rand = torch.randn(9, 70, device=device), torch.rand(1024, device=device)
    out = torch.zeros(9, 70, dtype=torch.uint8, device=device)
    absmax = torch.zeros(10, device=device)
    random.seed(3)
    codes, state = F.quantize_blockwise(a, absmax=absmax, out=out, blocksize=64, rand=rand)
    assert codes is out and state.absmax is absmax
    random.seed(3)
    want, nested = F.quantize_blockwise(a, blocksize=64, nested=True, rand=rand)
    assert torch.equal(want, out) and nested.nested
    # Scales are rounded to the nearest level: their error would be that of a whole block.
    _, plain_nested = F.quantize_blockwise(a, blocksize=64, nested=True)
    assert torch.equal(nested.absmax, plain_nested.absmax)


X, CODE, RAND = torch.randn(100), torch.from_numpy(TABLES["dynamic"].copy()), torch.rand(1024)
BAD_OPS = [
    ("A", (X.double(), CODE, 64, RAND, 0)),
    ("code", (X, CODE[:0], 64, RAND, 0)),
    ("blocksize", (X, CODE, 0, RAND, 0)),
    ("rand", (X, CODE, 64, RAND.double(), 0)),
    ("rand", (X, CODE, 64, RAND[:0], 0)),
    ("offset", (X, CODE, 64, RAND, -1)),
    ("offset", (X, CODE, 64, RAND, 1024)),
]


@pytest.mark.parametrize(("argument", "args"), BAD_OPS)
def test_bad_argument_of_the_op_gets_a_sentence(blockwise, device, argument, args):
    args = [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]
    sentence = rf"^quantize_blockwise_stochastic: .*\b{argument} .*, got "
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        blockwise.quantize_blockwise_stochastic(*args)


def test_too_few_random_numbers():
    out = torch.full((100,), 7, dtype=torch.uint8)
    with pytest.raises(AssertionError, match=r"rand must have at least 1024 elements, got 1023"):
        F.quantize_blockwise(X, out=out, rand=RAND[:1023])
    assert (out == 7).all()


def test_compiles_into_one_graph(device):
    F.quantize_blockwise(torch.ones(1, device=device))  # the default code exists

    def round_trip(x, rand):
        codes, state = F.quantize_blockwise(x, blocksize=64, rand=rand)
        return F.dequantize_blockwise(codes, state)

    x, rand = torch.randn(700, device=device), torch.rand(1024, device=device)
    code = F.create_dynamic_map().to(device)
    want = ops.quantize_blockwise_stochastic(x, code, 64, rand, 0)  # the first number is the first
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    values = ops.dequantize_blockwise(*want, code, 64, torch.float32)
    assert torch.equal(compiled(x, rand), values)
