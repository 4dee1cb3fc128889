# SPDX-License-Identifier: MIT
"""8-bit states with one scale for the whole tensor, and elements that stand still in any format.

That every rule follows the specification stands in test_rules.py and test_bounds.py.
"""

import pytest
import torch
from closeness import DTYPES, FORMATS, Parameter, assert_step, call, gradient, implementation, numpy
from test_rules import HYPER


@pytest.fixture(params=["dispatched", "plain"])
def functions(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return request.param


def trained(functions, rule, form, sizes, dtype, device, steps=3):
    parameters = [Parameter(rule, form, n, dtype, device) for n in sizes]
    for t in range(steps):
        call(functions, parameters, [gradient(p.param) for p in parameters], HYPER[rule], t)
    return parameters


@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_scale_spans_many_tiles(device, functions, rule):
    h = HYPER[rule]
    p = Parameter(rule, "8bit", 30001, torch.float32, device)
    for t in range(2):
        before = p.snapshot()
        g = torch.randn(30001, device=device) * 1e-2
        g[20000] = 50.0  # the largest state, far from the ends
        call(functions, [p], [g], h, t)
        assert_step(p.param, p.stored(), rule, h, before, numpy(g), t + 1, p.block)
        assert p.states[0][20000] == 255
    assert (p.states[0] == 127).float().mean() < 0.9  # the others are not lost


def test_every_tensor_has_its_own_scale(device, functions):
    together = trained(functions, "adam", "8bit", (300, 20000, 5), torch.float32, device, 1)
    for p in together:
        for k in range(2):
            assert p.scales[k].item() > 0
    scales = {p.scales[0].item() for p in together}
    assert len(scales) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["adam", "lion", "adagrad"])
def test_every_instruction_set_gives_the_same_bits(cpu_isa, rule, dtype):
    from bitsandbytes import _C

    results = []
    for isa in ("baseline", cpu_isa):
        _C.set_cpu_isa(isa)
        torch.manual_seed(0)
        parameters = trained("dispatched", rule, "8bit", (9001, 40), dtype, "cpu")
        results.append([t for p in parameters for t in (p.param, *p.states, *p.scales)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_three_states_are_refused(functions):
    p = Parameter("ademamix", "8bit", 30, torch.float32, "cpu")
    before = p.param.clone()
    with pytest.raises((RuntimeError, ValueError), match="optimizer_step_8bit: rule must"):
        call(functions, [p], [torch.ones(30)], HYPER["ademamix"], 0)
    assert torch.equal(p.param, before)


def test_arguments_are_checked(functions):
    p = Parameter("adam", "8bit", 30, torch.float32, "cpu")
    p.scales[0] = torch.zeros(2)
    with pytest.raises((RuntimeError, ValueError), match="optimizer_step_8bit: max1 must"):
        call(functions, [p], [torch.ones(30)], HYPER["adam"], 0)


def test_new_scales_may_not_replace_old_ones_in_place():
    # The step reads the old ones when it has written the new ones.
    p = Parameter("lion", "8bit", 30, torch.float32, "cpu")
    scale = torch.ones(1)
    op = implementation("dispatched", "optimizer_step_8bit")
    qmap = torch.linspace(-1, 1, 256)
    tail = (torch.tensor(0), None, 1e-2, 0.9, 0.99, 0.0, 0.0, 0.0, 0.0, 1.0, False)
    lists = ([p.param], [torch.ones(30)], p.states, [])
    with pytest.raises(RuntimeError, match="new_max1 must not share memory with max1"):
        op("lion", *lists, scale, None, scale, None, qmap, None, *tail)


def test_other_maps_are_taken(device, functions):
    # Levels of the caller's, here equally spaced.
    qmap = torch.linspace(-1, 1, 256).to(device)
    op = implementation(functions, "optimizer_step_8bit")
    param, grad = torch.zeros(300, device=device), torch.randn(300, device=device)
    codes, new = torch.zeros(300, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    tail = (torch.tensor(0, device=device), None, 1.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, False)
    op("momentum", [param], [grad], [codes], [], torch.zeros_like(new), None, new, None, qmap, None,
       *tail)  # fmt: skip
    assert new.item() == grad.abs().max().item()
    assert (qmap[codes.long()] * new - grad).abs().max() <= new.item() / 255 * 1.001


# --- elements that stand still -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rule", ["adam", "lion", "rmsprop"])
def test_zero_gradients_are_skipped(device, functions, rule, form, dtype):
    h = HYPER[rule]
    p, *_ = trained(functions, rule, form, (700,), dtype, device)
    before = p.snapshot()
    g = gradient(p.param)
    g[::3] = 0.0  # in every block
    call(functions, [p], [g], h, 3, skip_zeros=True)
    assert_step(p.param, p.stored(), rule, h, before, numpy(g), 4, p.block, skip_zeros=True)
    kept = numpy(p.param)[::3]
    assert (kept == before[0][::3]).all()


@pytest.mark.parametrize("form", FORMATS)
def test_idle_tensors_keep_every_bit(device, functions, form):
    # Codes that were stored again would lose a little each time: the lowest level is not -1.
    idle, active = trained(functions, "adam", form, (9000, 300), torch.float32, device)
    if form != "32bit":
        idle.states[0].clamp_(max=200)  # so that the largest level in use is not 1
    kept = [x.clone() for x in (idle.param, *idle.states, *idle.scales)]
    grads = [torch.zeros_like(idle.param), gradient(active.param)]
    before = active.param.clone()
    for t in range(3):
        call(functions, [idle, active], grads, HYPER["adam"], 3 + t, skip_zeros=True)
    for a, b in zip((idle.param, *idle.states, *idle.scales), kept, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(active.param, before)


def test_idle_blocks_follow_the_scale_of_their_tensor(device, functions):
    # A part that stands still is stored by the tensor's new scale.
    p, *_ = trained(functions, "momentum", "8bit", (600,), torch.float32, device)
    before = p.snapshot()
    g = torch.zeros(600, device=device)
    g[500:] = 100.0
    call(functions, [p], [g], HYPER["momentum"], 3, skip_zeros=True)
    assert_step(
        p.param, p.stored(), "momentum", HYPER["momentum"], before, numpy(g), 4, p.block,
        skip_zeros=True,
    )  # fmt: skip
    assert p.scales[0].item() > 90


@pytest.mark.parametrize("form", ["8bit_blockwise", "8bit"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("rule", ["adam", "momentum"])
def test_bad_gradients_cost_their_own_state_only(device, functions, rule, form, bad):
    p, *_ = trained(functions, rule, form, (700,), torch.float32, device)
    before = p.snapshot()
    g = gradient(p.param)
    g[[0, 300, 699]] = bad
    call(functions, [p], [g], HYPER[rule], 3)
    assert_step(p.param, p.stored(), rule, HYPER[rule], before, numpy(g), 4, p.block)
    assert (numpy(p.param)[[0, 300, 699]] == before[0][[0, 300, 699]]).all()
    for states in p.snapshot()[1]:
        assert (states[[0, 300, 699]] == 0).all()


def test_an_idle_stretch_keeps_the_scale_up(device, functions):
    # The largest state of the tensor lies where all elements are skipped, far from those that move.
    p, *_ = trained(functions, "momentum", "8bit", (20_000,), torch.float32, device)
    g = torch.zeros(20_000, device=device)
    g[:100] = 1000.0
    call(functions, [p], [g], HYPER["momentum"], 3, skip_zeros=True)
    before = p.snapshot()
    g = torch.zeros(20_000, device=device)
    g[19_000:] = 0.5
    call(functions, [p], [g], HYPER["momentum"], 4, skip_zeros=True)
    assert_step(
        p.param, p.stored(), "momentum", HYPER["momentum"], before, numpy(g), 5, p.block,
        skip_zeros=True,
    )  # fmt: skip
    assert p.scales[0].item() > 900
