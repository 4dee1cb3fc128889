# SPDX-License-Identifier: MIT
"""Stochastic rounding of bfloat16 parameters: its bits, where they come from, and that they are
fair."""

import numpy as np
import pytest
import torch
from closeness import FORMATS, Parameter, call, gradient, numpy
from test_rules import CASES, HYPER

from bitsandbytes.plain import rounding as plain
from reference import optim, rounding

BF16 = torch.bfloat16
SEEDS = (0, 1, -7, 2**40 + 3, 2**63 - 1)

# The vectors that Salmon et al. publish with their library Random123.
KNOWN = [
    ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([2**32 - 1] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.fixture(params=["dispatched", "plain"])
def functions(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return request.param


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_generator_gives_the_known_answers(device, counter, key, words):
    want = [int(word, 16) for word in words.split()]
    assert rounding.philox(np.array([counter]), key).tolist() == [want]
    tensors = tuple(torch.tensor([c], device=device) for c in counter)
    assert plain.philox(tensors, key).tolist() == [want]


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_bits_are_those_of_the_specification(device, seed):
    for n, tensor, t in ((1, 0, 1), (1003, 5, 77), (64, 70000, 2**33 + 1)):
        got = plain.rounding_bits(n, seed, tensor, t, torch.device(device))
        assert np.array_equal(numpy(got), rounding.bits(n, seed, tensor, t))


def test_known_numbers_round_as_the_specification_says():
    x = np.array([1.0, 1.00390625, -1.00390625, np.inf, -np.inf, np.nan, 3.4e38, 1e-40], np.float32)
    for random in (0, 0x7FFF, 0x8000, 0xFFFF):
        bits = np.full(x.size, random, np.uint32)
        want = rounding.round_up(x, bits)
        got = plain.round_stochastic(torch.from_numpy(x), torch.from_numpy(bits.astype(np.int32)))
        np.testing.assert_array_equal(got.numpy(), want)
        up = random >= 0x8000
        assert want[1] == (1.0078125 if up else 1.0) and want[2] == -want[1]


def pair(rule, form, n, device):
    """The same numbers as a bfloat16 and as a float32 parameter."""
    rounded, exact = (Parameter(rule, form, n, kind, device) for kind in (BF16, torch.float32))
    exact.param.copy_(rounded.param)
    return rounded, exact


# The step in float32 gives the numbers before they are rounded: the results must then agree bit for
# bit, on every device and instruction set.
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rule", "form"), CASES)
def test_step_takes_the_bits_of_the_specification(device, functions, rule, form, seed):
    sizes = (5, 1003, 300)
    rounded, exact = zip(*(pair(rule, form, n, device) for n in sizes), strict=True)
    grads = [gradient(p.param) for p in rounded]
    taken = 3
    for list_, kind in ((rounded, BF16), (exact, torch.float32)):
        call(functions, list_, [g.to(kind) for g in grads], HYPER[rule], taken, rounding_seed=seed)
    for i, (a, b) in enumerate(zip(rounded, exact, strict=True)):
        bits = rounding.bits(sizes[i], seed, i, taken + 1)
        assert np.array_equal(numpy(a.param), rounding.round_up(numpy(b.param), bits))
        for s, t in zip(a.states, b.states, strict=True):
            assert torch.equal(s, t)


@pytest.mark.parametrize("form", FORMATS)
def test_every_instruction_set_gives_the_same_bits(cpu_isa, form):
    from bitsandbytes import _C

    results = []
    for isa in ("baseline", cpu_isa):
        _C.set_cpu_isa(isa)
        torch.manual_seed(0)
        p = Parameter("adam", form, 2001, BF16, "cpu")
        for t in range(3):
            call("dispatched", [p], [gradient(p.param)], HYPER["adam"], t, rounding_seed=9)
        results.append(p.param)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_rounded_to_nearest(device, functions, dtype):
    a, b = (Parameter("adam", "32bit", 300, dtype, device) for _ in "12")
    b.param.copy_(a.param)
    g = gradient(a.param)
    call(functions, [a], [g], HYPER["adam"], 0, rounding_seed=1)
    call(functions, [b], [g], HYPER["adam"], 0)
    assert torch.equal(a.param, b.param)


def test_bits_change_with_seed_step_and_tensor(device, functions):
    def run(seed, taken, place):
        h = optim.Hyper(lr=1e-3)
        parameters = [Parameter("momentum", "32bit", 256, BF16, device) for _ in range(3)]
        for p in parameters:
            p.param.fill_(1.0)
        grads = [torch.ones_like(p.param) for p in parameters]
        call(functions, parameters, grads, h, taken, rounding_seed=seed)
        return parameters[place].param

    first = run(1, 5, 1)
    assert torch.equal(first, run(1, 5, 1))
    assert not any(
        torch.equal(first, other) for other in (run(2, 5, 1), run(1, 6, 1), run(1, 5, 2))
    )


@pytest.mark.parametrize("value", [1.0, -1.5, 0.01])
def test_rounding_is_unbiased(device, functions, value):
    # Updates far below half a unit of the last place, which rounding to nearest loses for ever.
    n, steps, lr = 20000, 20, abs(value) * 2.0**-12
    h = optim.Hyper(lr=lr)
    stochastic, nearest = (Parameter("lion", "32bit", n, BF16, device) for _ in "12")
    for p in (stochastic, nearest):
        p.param.fill_(value)
    start = stochastic.param.double().mean().item()
    g = torch.ones(n, dtype=BF16, device=device)
    for t in range(steps):
        call(functions, [stochastic], [g], h, t, rounding_seed=4)
        call(functions, [nearest], [g], h, t)
    assert (nearest.param == nearest.param[0]).all() and nearest.param[0].item() == start
    moved = stochastic.param.double().mean().item() - start
    # A step is one unit u of the last place with probability lr / u, else nothing: the variance of
    # a sum of steps is below steps * lr * u.
    unit = abs(value) * 2.0**-7
    deviation = (steps * lr * unit / n) ** 0.5
    assert abs(moved + steps * lr) <= 5 * deviation
    assert abs(moved) > 20 * deviation


@pytest.mark.parametrize("form", ["8bit_blockwise", "8bit"])
def test_elements_that_stand_still_keep_their_bits(device, functions, form):
    p = Parameter("adam", form, 300, BF16, device)
    before = p.param.clone()
    g = gradient(p.param)
    g[::2], g[1] = 0.0, torch.nan
    call(functions, [p], [g], HYPER["adam"], 0, rounding_seed=3, skip_zeros=True)
    assert torch.equal(p.param[::2], before[::2]) and p.param[1] == before[1]
    assert not torch.equal(p.param[3::2], before[3::2])
