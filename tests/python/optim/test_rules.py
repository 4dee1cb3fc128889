# SPDX-License-Identifier: MIT
"""Every rule with every format of its states against the specification, and recordings."""

import numpy as np
import pytest
import torch
from closeness import DTYPES, FORMATS, Parameter, U, assert_step, call, gradient, numpy

from reference import optim as reference

HYPER = {
    "adam": reference.Hyper(lr=1e-2, weight_decay=0.1),
    "lion": reference.Hyper(lr=1e-2, beta2=0.99, eps=0.0, weight_decay=0.1),
    "momentum": reference.Hyper(lr=1e-2, weight_decay=0.01),
    "rmsprop": reference.Hyper(lr=1e-2, beta1=0.99, weight_decay=0.01),
    "adagrad": reference.Hyper(lr=1e-2, eps=1e-10, weight_decay=0.01),
    "ademamix": reference.Hyper(lr=1e-2, weight_decay=0.1, t_alpha=60, t_beta3=60),
}
CASES = [(rule, form) for rule in HYPER for form in FORMATS if (rule, form) != ("ademamix", "8bit")]


def follow(functions, device, rule, form, dtype, steps, h=None, sizes=(700, 33)):
    h = h or HYPER[rule]
    parameters = [Parameter(rule, form, n, dtype, device) for n in sizes]
    for t in range(1, steps + 1):
        before = [p.snapshot() for p in parameters]
        grads = [gradient(p.param) for p in parameters]
        call(functions, parameters, grads, h, t - 1)
        for p, start, g in zip(parameters, before, grads, strict=True):
            assert_step(p.param, p.stored(), rule, h, start, numpy(g), t, p.block)


# Each step from where the one before arrived: errors do not hide behind earlier ones.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "form"), CASES)
def test_hundred_steps_follow_the_specification(device, rule, form, dtype):
    follow("dispatched", device, rule, form, dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "form"), CASES)
def test_plain_steps_follow_the_specification(device, rule, form, dtype):
    follow("plain", device, rule, form, dtype, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", HYPER)
def test_long_parameters_follow_the_specification(device, rule, dtype):
    follow("dispatched", device, rule, "8bit_blockwise", dtype, 4, sizes=(1024, 5 * 1024 + 304))


def unusual_gradient(dtype, n):
    """Blocks of all scales and of zeros, with elements far below their block's largest."""
    scale = torch.randint(-24, 17, (n // 100 + 1,)).mul(4).float()
    scale[::7] = 0.0
    if dtype == torch.float16:
        scale.clamp_(-12, 12)
    g = torch.randn(n) * scale.exp2().repeat_interleave(100)[:n]
    g *= torch.tensor([1.0, 1.0, 1e-3, 1e-7, 0.0, -0.0])[torch.randint(0, 6, (n,))]
    g[2500:2900] = -0.0
    g[3000], g[4000] = torch.inf, torch.nan
    return g.to(dtype)


# Which tables a kernel has depends on the dtype of parameters.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adam", "lion", "ademamix"])
def test_states_do_not_depend_on_the_dtype_of_parameters(device, rule, dtype):
    n = 7 * 1024 + 304
    pair = [Parameter(rule, "8bit_blockwise", n, t, device) for t in (dtype, torch.float32)]
    for k, state in enumerate(pair[0].states):
        state.copy_(torch.randint(0, 256, state.shape))
        scale = torch.randint(-30, 8, pair[0].scales[k].shape).float().exp2()
        scale.flatten()[3::5] *= -1.0  # nobody makes such scales, but a file may hold them
        pair[0].scales[k].copy_(scale)
        pair[1].states[k].copy_(state)
        pair[1].scales[k].copy_(scale)
    for t in range(4):
        g = unusual_gradient(dtype, n).to(device)
        for p in pair:
            call("dispatched", [p], [g.to(p.param.dtype)], HYPER[rule], t)
        for lists in ("states", "scales"):
            for a, b in zip(*(getattr(p, lists) for p in pair), strict=True):
                assert torch.equal(a, b), (t, lists)


@pytest.mark.parametrize("functions", ["dispatched", "plain"])
@pytest.mark.parametrize("schedule", [{}, {"t_alpha": 4}, {"t_beta3": 4}])
def test_schedules_of_ademamix(device, functions, schedule):
    h = reference.Hyper(lr=1e-2, **schedule)
    follow(functions, device, "ademamix", "32bit", torch.float32, 6, h, sizes=(300,))


@pytest.mark.parametrize("form", ["32bit", "8bit_blockwise"])
def test_rows_of_a_state_are_states_of_their_own(device, form):
    # Without the slow average AdEMAMix is Adam, whose states it must then hold, whatever the place
    # of the second row.
    h = reference.Hyper(lr=1e-2, alpha=0.0)
    mixed, adam = (Parameter(r, form, 300, torch.float32, device) for r in ("ademamix", "adam"))
    adam.param.copy_(mixed.param)
    for t in range(5):
        g = gradient(mixed.param)
        for p in (mixed, adam):
            call("dispatched", [p], [g], h, t)
    assert torch.equal(mixed.states[0][0], adam.states[0])
    assert torch.equal(mixed.states[1], adam.states[1])
    assert not torch.equal(mixed.states[0][1], mixed.states[0][0])
    # Five steps, each with 16 roundings of its size and one of the parameter.
    torch.testing.assert_close(mixed.param, adam.param, rtol=5 * U, atol=5 * 16 * U * 1e-2)


@pytest.mark.parametrize("form", FORMATS)
def test_lamb_and_lars_are_names_of_rules(device, form):
    for name, rule in (("lamb", "adam"), ("lars", "momentum")):
        for functions in ("dispatched", "plain"):
            a, b = (Parameter(r, form, 300, torch.float32, device) for r in (name, rule))
            b.param.copy_(a.param)
            g = gradient(a.param)
            for p in (a, b):
                call(functions, [p], [g], HYPER[rule], 0)
            assert torch.equal(a.param, b.param)
            for s, t in zip(a.states, b.states, strict=True):
                assert torch.equal(s, t)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("functions", ["dispatched", "plain"])
def test_zero_elements_are_allowed(device, functions, form):
    parameters = [Parameter("adam", form, n, torch.float32, device) for n in (0, 300, 0)]
    for p in parameters:
        for scale in p.scales:
            scale.fill_(0.5)
    grads = [gradient(p.param) for p in parameters]
    before = parameters[1].snapshot()
    call(functions, parameters, grads, HYPER["adam"], 0, max_unorm=0.5)
    assert_step(
        parameters[1].param,
        parameters[1].stored(),
        "adam",
        HYPER["adam"],
        before,
        numpy(grads[1]),
        1,
        parameters[1].block,
        max_unorm=0.5,
    )
    if form == "8bit":
        assert parameters[0].scales[0].item() == 0.5


# --- recordings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("functions", ["dispatched", "plain"])
def test_ademamix_matches_recording(device, golden, functions, dtype):
    recorded, others = golden("ademamix_lamb_lars"), golden("adam")
    kind = str(dtype).removeprefix("torch.") + ".AdEMAMix8bit"
    h = reference.Hyper(lr=1e-2, weight_decay=1e-2)
    for which, form in ((0, "8bit_blockwise"), (2, "32bit")):
        inputs = recorded if which == 0 else others
        start = inputs[f"p0.{which}"]
        p = Parameter("ademamix", form, start.numel(), dtype, device)
        p.param.copy_(start)
        for t in range(10):
            g = inputs[f"g{t}.{which}"].to(dtype).to(device)
            call(functions, [p], [g], h, t)
            if t not in (0, 9):
                continue
            want = recorded[f"{kind}.step{t + 1}.{which}"].float()
            error = (p.param.cpu().float() - want).abs()
            if dtype == torch.float32:
                moved = (want - start).abs()
                limit = 0.01 * torch.maximum(moved, torch.tensor(1e-2))
            else:
                # The recorded kernel rounds p twice a step.
                limit = (t + 1) * 2.0**-7 * (want.abs() + 1e-2)
            assert (error <= limit).all()
        for k, state in enumerate(p.states, 1):
            want = recorded[f"{kind}.state{k}.{which}"]
            if form == "32bit":
                scale = want.abs().max().item()
                torch.testing.assert_close(state.cpu(), want, rtol=40 * U, atol=40 * U * scale)
            else:
                difference = (state.cpu().int() - want.int()).abs()
                assert difference.max() <= 1 and (difference == 0).float().mean() >= 0.999
                want = recorded[f"{kind}.absmax{k}.{which}"]
                torch.testing.assert_close(p.scales[k - 1].cpu(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["float32.LAMB", "bfloat16.LAMB", "float32.LARS"])
@pytest.mark.parametrize("functions", ["dispatched", "plain"])
def test_bounded_rules_match_recording(device, golden, functions, name):
    # bfloat16 LARS: the recorded implementation has none.
    recorded, inputs = golden("ademamix_lamb_lars"), golden("adam")
    dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
    rule = name.split(".")[1].lower()
    h = reference.Hyper(lr=1e-2, eps=1e-8 if rule == "lamb" else 0.0)
    p = Parameter(rule, "32bit", 100, dtype, device)
    p.param.copy_(inputs["p0.2"])
    squares = torch.zeros(1, device=device)
    for t in range(10):
        g = inputs[f"g{t}.2"].to(dtype).to(device)
        bound = 1.0 if rule == "lamb" else 0.02
        call(functions, [p], [g], h, t, max_unorm=bound, unorm=squares)
        if t + 1 in (1, 5, 10):
            want = recorded[f"{name}32bit.step{t + 1}.2"].float()
            if dtype == torch.float32:
                torch.testing.assert_close(p.param.cpu(), want, rtol=1e-5, atol=1e-6)
            else:
                limit = (t + 1) * 2.0**-8 * want.abs() + 2.0**-10 * 1e-2 * (t + 1)
                assert ((p.param.cpu().float() - want).abs() <= limit).all()
    for k, state in enumerate(p.states, 1):
        want = recorded[f"{name}32bit.state{k}.2"]
        torch.testing.assert_close(state.cpu(), want, rtol=40 * U, atol=40 * U * want.abs().max())
    want = recorded[f"{name}32bit.unorm_vec.2"]
    # The recorded kernel takes powers in float32, and 1 - beta2^t is 0.01: off by some 1e-5 each.
    # Gradients of bfloat16 are scaled in bfloat16 there.
    rtol = 1e-4 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(squares.cpu(), want, rtol=rtol, atol=0)
    assert np.sqrt(want.item()) > bound * inputs["p0.2"].norm()  # the bound was at work
