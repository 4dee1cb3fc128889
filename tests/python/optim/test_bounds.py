# SPDX-License-Identifier: MIT
"""What holds for whole tensors: bounds on updates, percentile clipping, factors on gradients."""

import numpy as np
import pytest
import torch
from closeness import (
    DTYPES,
    FORMATS,
    ROUNDING,
    Parameter,
    U,
    assert_step,
    call,
    gradient,
    implementation,
    numpy,
    preview,
)
from test_rules import CASES, HYPER

from reference import optim as reference


@pytest.fixture(params=["dispatched", "plain"])
def functions(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return request.param


# --- bounds on updates ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "form"), CASES)
def test_bounded_steps_follow_the_specification(device, functions, rule, form, dtype):
    h = HYPER[rule]
    parameters = [Parameter(rule, form, n, dtype, device) for n in (700, 33)]
    unorm = torch.full((2,), torch.nan, device=device)
    bounded = 0
    for t in range(1, 6):
        before = [p.snapshot() for p in parameters]
        grads = [gradient(p.param) for p in parameters]
        call(functions, parameters, grads, h, t - 1, max_unorm=0.3, unorm=unorm)
        for i, (p, start, g) in enumerate(zip(parameters, before, grads, strict=True)):
            want = assert_step(
                p.param, p.stored(), rule, h, start, numpy(g), t, p.block, max_unorm=0.3
            )
            bounded += want.scale < 1
            # Squares are off by twice what the norm is, which assert_step allows for.
            squares = np.sum(np.square(want.update))
            slack = 1e-4 if rule != "lion" else 4.0 / squares  # one sign next to zero
            assert abs(unorm[i].item() - squares) <= slack * squares
    assert bounded > 0


@pytest.mark.parametrize("form", FORMATS)
def test_sums_span_many_tiles(device, functions, form):
    h = HYPER["adam"]
    p = Parameter("adam", form, 40001, torch.float32, device)
    before = p.snapshot()
    g = gradient(p.param)
    unorm = torch.zeros(1, device=device)
    call(functions, [p], [g], h, 0, max_unorm=0.01, unorm=unorm)
    want = reference.advance("adam", h, *before[:1], numpy(g), before[1], 1, max_unorm=0.01)
    assert want.scale < 0.1
    # In blocks and tiles the sums are better than their worst order, n roundings.
    np.testing.assert_allclose(unorm.item(), np.sum(np.square(want.update)), rtol=1e-5)
    np.testing.assert_allclose(numpy(p.param), want.param, rtol=0, atol=1e-2 * 1e-5 + 2 * U * 5)


@pytest.mark.parametrize(("rule", "max_unorm"), [("lamb", 1.0), ("lars", 0.02)])
@pytest.mark.parametrize("form", FORMATS)
def test_trust_ratio(device, functions, rule, max_unorm, form):
    # You et al.: a step as long as max_unorm |p| lr at most, in the direction of the free step.
    h = reference.Hyper(lr=0.5, eps=1e-8 if rule == "lamb" else 0.0)
    free, bounded, loose = (Parameter(rule, form, 5000, torch.float32, device) for _ in "123")
    start = free.param.clone() * 0.1
    for p in (free, bounded, loose):
        p.param.copy_(start)
    g = torch.randn(5000, device=device) * 3
    call(functions, [free], [g], h, 0)
    call(functions, [bounded], [g], h, 0, max_unorm=max_unorm)
    call(functions, [loose], [g], h, 0, max_unorm=1e6)
    step, short = ((p.param - start).double() for p in (free, bounded))
    want = step * (h.lr * max_unorm * start.double().norm() / step.norm())
    assert want.norm() < step.norm() / 2
    torch.testing.assert_close(short, want, rtol=1e-5, atol=2 * U)
    assert torch.equal(loose.param, free.param)
    # A bound is on the parameter, not on what its states see.
    for s, t in zip(bounded.states, free.states, strict=True):
        assert torch.equal(s, t)


@pytest.mark.parametrize("form", FORMATS)
def test_parameter_of_zeros_is_not_bounded(device, functions, form):
    free, bounded = (Parameter("adam", form, 300, torch.float32, device) for _ in "12")
    g = gradient(free.param)
    for p, how in ((free, {}), (bounded, {"max_unorm": 0.1})):
        p.param.zero_()
        call(functions, [p], [g], HYPER["adam"], 0, **how)
    assert torch.equal(free.param, bounded.param) and free.param.any()


@pytest.mark.parametrize("form", FORMATS)
def test_unorm_alone_changes_nothing(device, functions, form):
    plain, watched = (Parameter("adam", form, 300, torch.float32, device) for _ in "12")
    watched.param.copy_(plain.param)
    g = gradient(plain.param)
    unorm = torch.zeros(1, device=device)
    call(functions, [plain], [g], HYPER["adam"], 0)
    call(functions, [watched], [g], HYPER["adam"], 0, unorm=unorm)
    assert torch.equal(plain.param, watched.param)
    # The first step of Adam goes by 1 in every element.
    torch.testing.assert_close(unorm.item(), 300.0, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "form"), CASES)
def test_bounds_from_outside_equal_own_ones(device, functions, rule, form, dtype):
    # As parts of one tensor bound their updates together: a preview, then a step by its factors.
    h, factors = HYPER[rule], torch.tensor([0.5, 2.0], device=device)
    own, parts = ([Parameter(rule, form, n, dtype, device) for n in (9000, 33)] for _ in "12")
    relative, absolute = ROUNDING[dtype]
    bounded = 0
    for t in range(3):
        for a, b in zip(own, parts, strict=True):
            b.param.copy_(a.param)
        before = [p.snapshot() for p in parts]
        grads = [gradient(p.param) for p in own]
        how = {"gnorm_scales": factors, "skip_zeros": True}
        squares = preview(functions, parts, grads, h, t, **how)
        assert squares.shape == (2, 2) and squares.dtype == torch.float32
        for p, (param, states), known in zip(parts, before, squares[0], strict=True):
            now, states_now = p.snapshot()
            assert np.array_equal(now, param)
            assert all(map(np.array_equal, states_now, states))
            np.testing.assert_allclose(known.item(), np.sum(np.square(np.float64(param))), 1e-5)
        unorm = torch.zeros(2, device=device)
        call(functions, own, grads, h, t, max_unorm=0.3, unorm=unorm, **how)
        assert torch.equal(squares[1], unorm)
        lengths = squares.double().sqrt()
        scales = (0.3 * lengths[0] / lengths[1]).clamp(max=1.0).float()
        bounded += (scales < 1).sum().item()
        call(functions, parts, grads, h, t, update_scales=scales, **how)
        for a, b, (start, _) in zip(own, parts, before, strict=True):
            for s, u in zip(a.states, b.states, strict=True):
                assert torch.equal(s, u)
            # The factors differ by what sums and roots in float32 lose.
            moved = np.abs(numpy(a.param) - start).max()
            error = np.abs(numpy(a.param) - numpy(b.param))
            assert (error <= 2 * relative * np.abs(start) + absolute + 1e-6 * moved).all()
    assert bounded > 0


@pytest.mark.parametrize("form", ["8bit_blockwise", "8bit"])
def test_bad_gradients_do_not_spoil_the_bound(device, functions, form):
    h = HYPER["adam"]
    p = Parameter("adam", form, 300, torch.float32, device)
    before = p.snapshot()
    g = gradient(p.param)
    g[3], g[299] = torch.inf, torch.nan
    unorm = torch.zeros(1, device=device)
    call(functions, [p], [g], h, 0, max_unorm=0.1, unorm=unorm)
    assert_step(p.param, p.stored(), "adam", h, before, numpy(g), 1, p.block, max_unorm=0.1)
    torch.testing.assert_close(unorm.item(), 298.0, rtol=1e-4, atol=0)


def test_threads_do_not_change_the_sums():
    h = HYPER["adam"]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            parameters = [Parameter("adam", "32bit", n, torch.float32, "cpu") for n in (90001, 17)]
            grads = [gradient(p.param) for p in parameters]
            unorm = torch.zeros(2)
            call("dispatched", parameters, grads, h, 0, max_unorm=0.1, unorm=unorm)
            history = [torch.zeros(100) for _ in grads]
            norms = torch.ops.bitsandbytes.percentile_clipping_step(
                grads, history, torch.tensor(0), 5
            )
            results.append([unorm, norms, *history, *(p.param for p in parameters)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


# --- factors on gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "form"), CASES)
def test_factors_scale_each_gradient(device, functions, rule, form, dtype):
    factors = torch.tensor([0.25, 2.0, 1.0], device=device)
    scaled, direct = ([Parameter(rule, form, n, dtype, device) for n in (300, 40, 7)] for _ in "12")
    for a, b in zip(scaled, direct, strict=True):
        b.param.copy_(a.param)
    for t in range(2):
        grads = [gradient(p.param).clamp(-1e4, 1e4) * 0.01 for p in scaled]
        larger = [g.float() * f for g, f in zip(grads, factors, strict=True)]
        if dtype == torch.float16:  # where a quarter of a small number is rounded
            grads = [torch.where(g.abs() < 1e-3, 0, g) for g in grads]
            larger = [g.float() * f for g, f in zip(grads, factors, strict=True)]
        call(functions, scaled, grads, HYPER[rule], t, gnorm_scales=factors)
        call(functions, direct, [g.to(dtype) for g in larger], HYPER[rule], t)
    for a, b in zip(scaled, direct, strict=True):
        assert torch.equal(a.param, b.param)
        for s, u in zip(a.states, b.states, strict=True):
            assert torch.equal(s, u)


# --- percentile clipping -------------------------------------------------------------------------


def record(functions, grads, history, taken, percentile):
    step = torch.tensor(taken, device=grads[0].device)
    op = implementation(functions, "percentile_clipping_step")
    return op(grads, history, step, percentile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("percentile", [0, 5, 99])
def test_percentile_clipping_follows_the_specification(device, functions, dtype, percentile):
    sizes = (1, 333, 9000)
    history = [torch.zeros(100, device=device) for _ in sizes]
    expected = [np.zeros(100) for _ in sizes]
    clipped = 0
    for t in range(1, 131):
        grads = [(torch.randn(n) * np.exp(np.sin(t))).to(dtype).to(device) for n in sizes]
        out = record(functions, grads, history, t - 1, percentile)
        assert out.shape == (3, 3) and out.dtype == torch.float32
        for i, g in enumerate(grads):
            norm = np.linalg.norm(numpy(g).astype(np.float64))
            clip, factor = reference.percentile_clipping(expected[i], norm, t, percentile)
            # Sums of squares of up to 9000 terms, in blocks: some twenty roundings.
            np.testing.assert_allclose(numpy(out[:, i]), [norm, clip, factor], rtol=2e-6)
            np.testing.assert_allclose(numpy(history[i]), expected[i], rtol=2e-6)
            clipped += factor < 0.99
    assert clipped > 20 or percentile == 99


@pytest.mark.parametrize("form", FORMATS)
def test_percentile_clipping_equals_scaled_gradients(device, functions, form):
    # The loop that a user would write by hand.
    h = HYPER["adam"]
    clipped, by_hand = (Parameter("adam", form, 700, torch.float32, device) for _ in "12")
    by_hand.param.copy_(clipped.param)
    history, squares = [torch.zeros(100, device=device)], []
    for t in range(30):
        g = gradient(clipped.param) * (10 if t == 20 else 1)
        factors = record(functions, [g], history, t, 5)[2]
        call(functions, [clipped], [g], h, t, gnorm_scales=factors)
        norm = torch.linalg.vector_norm(g.double()).item()
        squares = [norm**2] * 100 if t == 0 else squares
        squares[(t + 1) % 100] = norm**2
        clip = sorted(squares)[5] ** 0.5
        call(functions, [by_hand], [g * min(1.0, clip / norm)], h, t)
    assert factors.item() <= 1
    # The factor is rounded, and g again: few roundings that the following steps forget.
    error = (clipped.param - by_hand.param).abs()
    if form == "32bit":
        assert error.max() <= 30 * 1e-2 * 64 * U
    else:  # where a code may turn over
        assert (error > 30 * 1e-2 * 64 * U).float().mean() <= 0.01


def test_norms_of_gradients_in_many_tiles(device, functions):
    # More tiles than threads take in one go, and tensors that share what is gone through together.
    sizes = (700_000, 3, 0, 70_000, 8192, 24_577)
    history = [torch.zeros(100, device=device) for _ in sizes]
    for t in range(2):
        grads = [torch.randn(n, device=device) for n in sizes]
        out = record(functions, grads, history, t, 5)
        norms = [g.double().norm().item() for g in grads]
        np.testing.assert_allclose(numpy(out[0]), norms, rtol=2e-6)
        again = record(functions, grads, [h.clone() for h in history], t + 1, 5)
        assert torch.equal(again[0], out[0])


def test_norm_that_is_not_finite_is_not_recorded(device, functions):
    history = [torch.zeros(100, device=device) for _ in range(2)]
    good, bad = torch.ones(4, device=device), torch.tensor([1.0, torch.nan], device=device)
    record(functions, [good, good], history, 0, 5)
    out = record(functions, [bad, torch.full_like(good, torch.inf)], history, 1, 5)
    assert out[0, 0].isnan() and out[0, 1].isinf()
    assert out[1:].tolist() == [[2, 2], [1, 1]]
    assert all((x == 4).all() for x in history)


def test_history_starts_with_the_first_finite_norm(device, functions):
    # Else nothing would move before the percentile leaves the zeros.
    history = [torch.zeros(100, device=device)]
    record(functions, [torch.full((4,), torch.inf, device=device)], history, 0, 5)
    out = record(functions, [torch.ones(4, device=device)], history, 1, 5)
    assert out[:, 0].tolist() == [2, 2, 1]
    assert (history[0] == 4).all()


def test_percentile_clipping_takes_any_strides(device, functions):
    g = torch.randn(30, 40, device=device)
    outs = []
    for view in (g, g.t(), g[:, ::2], torch.stack((g, g))[1]):
        history = [torch.zeros(100, device=device)]
        outs.append(record(functions, [view], history, 0, 5)[0].item())
    want = [g.norm().item(), g.norm().item(), g[:, ::2].norm().item(), g.norm().item()]
    np.testing.assert_allclose(outs, want, rtol=1e-6)


def test_percentile_clipping_checks_its_arguments(functions):
    g, history = [torch.ones(3)], [torch.zeros(100)]
    step = torch.tensor(0)
    op = implementation(functions, "percentile_clipping_step")
    for args, message in (
        (([], [], step, 5), "grads must"),
        ((g, [], step, 5), "gnorm_vec must"),
        ((g, history, step, 100), "percentile must"),
        ((g, history, step, -1), "percentile must"),
        ((g, [torch.zeros(99)], step, 5), r"gnorm_vec\[0\] must"),
        ((g, [torch.zeros(100, dtype=torch.float64)], step, 5), r"gnorm_vec\[0\] must"),
        (([torch.ones(3, dtype=torch.int32)], history, step, 5), "grads must"),
        ((g, history, torch.tensor(0.0), 5), "step must"),
    ):
        with pytest.raises(
            (RuntimeError, ValueError), match="percentile_clipping_step: " + message
        ):
            op(*args)
    assert not history[0].any()


@pytest.mark.parametrize("form", FORMATS)
def test_steps_check_what_they_hold_per_parameter(functions, form):
    p = Parameter("adam", form, 30, torch.float32, "cpu")
    before = p.param.clone()
    for named, message in (
        ({"max_unorm": -1.0}, "max_unorm must be zero or positive, got -1"),
        ({"gnorm_scales": torch.ones(2)}, "gnorm_scales must"),
        ({"gnorm_scales": torch.ones(1, dtype=torch.float64)}, "gnorm_scales must"),
        ({"unorm": torch.ones(3)}, "unorm must"),
        ({"update_scales": torch.ones(2)}, "update_scales must"),
        ({"update_scales": torch.ones(1), "max_unorm": 0.5}, "max_unorm must be 0 where"),
        ({"unorm": torch.ones(1, dtype=torch.float16)}, "unorm must"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call(functions, [p], [torch.ones(30)], HYPER["adam"], 0, **named)
    assert torch.equal(p.param, before)
