# SPDX-License-Identifier: MIT
"""What docs/numerics.md says of optimizers: each rule, quoted beside the test of what it says.

That the rules hold for every dtype, format and order of a list stands in the tests of each subject.
"""

import numpy as np
import pytest
import torch
from closeness import Parameter, assert_step, call, gradient, numpy
from numerics_page import Rules
from torch import nn

import bitsandbytes as bnb
from reference import optim as reference
from reference import rounding

ops = torch.ops.bitsandbytes
f32 = np.float32
INF, NAN = float("inf"), float("nan")
MOST = np.finfo(f32).max
ZERO = 127  # the code of 0 in the signed map
N = 1000  # three whole blocks of 256, and a short one
HYPER = reference.Hyper(lr=1e-2, weight_decay=0.1)
rule = Rules("Adam and AdamW", "What is the same bits where")


def test_every_rule_has_a_test_and_every_test_a_rule():
    rule.assert_tested()
    rule.assert_marked("Adam and AdamW")


@pytest.mark.parametrize("name", rule.names)
def test_page_has_the_words_that_are_tested(name):
    rule.assert_quoted(name)


# --- helpers --------------------------------------------------------------------------------------


def make(name, form, device, n=N, dtype=torch.float32):
    return Parameter(name, form, n, dtype, device)


def step(p, h=HYPER, taken=0, g=None, **options):
    """One step with a gradient, and a check of it against the specification."""
    before = p.snapshot()
    g = gradient(p.param) if g is None else g
    call("dispatched", [p], [g], h, taken, **options)
    scaled = numpy(g) * options.get("gnorm_scale", 1.0)
    how = {key: options[key] for key in ("max_unorm", "skip_zeros") if key in options}
    assert_step(p.param, p.stored(), p.rule, h, before, scaled, taken + 1, p.block, **how)


def fma(a, b, c):
    """a * b + c, rounded once: products of float32 are exact in float64."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(f32)


def copies(p):
    return [t.clone() for t in (p.param, *p.states, *p.scales)]


def assert_same(before, p):
    for a, b in zip(before, copies(p), strict=True):
        assert torch.equal(a, b)


# --- Adam -----------------------------------------------------------------------------------------


@rule(
    "adam",
    "With t the number of the step, counted from 1:",
    "g <- gradient * scale scale is 1",
    "m <- fma(m, beta1, g * (1 - beta1)) beta and 1 - beta in f32",
    "v <- fma(v, beta2, (g * g) * (1 - beta2))",
    "p <- fma(-step_size, m / (sqrt(v) + eps_t), p)",
    "p <- p * (1 - lr * weight_decay) after the update, and not scaled by it",
    "This is the usual quotient of `m / c1` and `sqrt(v) / c2 + eps`.",
)
def test_adam(device):
    p = make("adam", "32bit", device)
    for taken in (0, 1, 2, 999):
        _, (m, v) = p.snapshot()
        g = gradient(p.param)
        step(p, taken=taken, g=g, gnorm_scale=0.3)
        g = numpy(g) * f32(0.3)
        beta1, beta2 = f32(HYPER.beta1), f32(HYPER.beta2)
        # States are the same bits everywhere; the check of step() leaves them a few roundings.
        np.testing.assert_array_equal(numpy(p.states[0]), fma(m, beta1, g * (1 - beta1)))
        np.testing.assert_array_equal(numpy(p.states[1]), fma(v, beta2, g * g * (1 - beta2)))


@rule("adam", "p is widened to f32 and rounded once to its dtype at the end.")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_of_parameters(device, dtype):
    narrow, wide = make("adam", "32bit", device, dtype=dtype), make("adam", "32bit", device)
    wide.param.copy_(narrow.param)
    for taken in range(2):
        g = gradient(narrow.param)
        wide.param.copy_(narrow.param)
        call("dispatched", [narrow], [g], HYPER, taken)
        call("dispatched", [wide], [g.float()], HYPER, taken)
        assert torch.equal(narrow.param, wide.param.to(dtype))


@rule(
    "adam-states",
    "With 8-bit states m and v are decoded (`level * absmax`), advanced, used for p *before* they "
    "are quantized again, and stored with the block's new absmax.",
)
def test_8bit_states(device):
    p = make("adam", "8bit_blockwise", device)
    for taken in range(4):
        step(p, taken=taken)


@rule(
    "adam-not-finite",
    "gradient NaN or infinite | parameter unchanged (no decay either), both states 0 | NaN spreads "
    "into states and parameter, as in PyTorch |",
)
def test_gradients_that_are_not_finite(device):
    for form in ("8bit_blockwise", "32bit"):
        p = make("adam", form, device)
        step(p)
        before = p.param.clone()
        g = gradient(p.param)
        g[[3, 500, 999]] = torch.tensor([NAN, INF, -INF], device=device)
        call("dispatched", [p], [g], HYPER, 1)
        lost = ~g.isfinite()
        if form == "32bit":
            assert torch.equal(p.param.isnan(), lost)
            assert p.states[0][3].isnan() and p.states[1][3].isnan()
        else:
            assert torch.equal(p.param[lost], before[lost])
            assert (p.param != before)[~lost].float().mean() > 0.99
            assert (p.states[0][lost] == ZERO).all() and not p.states[1][lost].any()


@rule("adam-overflow", "state overflows | the largest f32 of its sign; NaN becomes 0 | infinity |")
def test_states_that_overflow(device):
    g = torch.full((N,), -3e38, device=device)
    g[256:] = 0
    for form in ("8bit_blockwise", "32bit"):
        adam, sgd = make("adam", form, device), make("momentum", form, device)
        call("dispatched", [adam], [g], HYPER, 0)
        for taken in range(2):
            call("dispatched", [sgd], [g], reference.Hyper(lr=0.0), taken)
        if form == "32bit":
            assert (adam.states[1][:256] == INF).all() and (sgd.states[0][:256] == -INF).all()
        else:
            assert adam.scales[1][0] == MOST and (adam.states[1][:256] == 255).all()
            assert sgd.scales[0][0] == MOST and not sgd.states[0][:256].any()
    p = make("adam", "8bit_blockwise", device)
    step(p)
    p.scales[0][1] = NAN
    call("dispatched", [p], [gradient(p.param)], HYPER, 1)
    assert p.scales[0][1] == 0 and p.scales[0][0] > 0


@rule(
    "adam-skip-zeros",
    "`skip_zeros` and gradient 0 | parameter unchanged; a block of such elements only is left as "
    "it is, otherwise their states are decoded and stored again with their block | parameter and "
    "states unchanged |",
)
def test_skip_zeros(device):
    for form in ("8bit_blockwise", "32bit"):
        p = make("adam", form, device)
        step(p)
        g = gradient(p.param)
        g[::2] = 0
        before = p.param.clone()
        step(p, taken=1, g=g, skip_zeros=True)
        assert torch.equal(p.param[::2], before[::2])
        g[256:512] = 0  # a whole block
        param, *stored = copies(p)
        call("dispatched", [p], [g], HYPER, 2, skip_zeros=True)
        assert torch.equal(p.param[g == 0], param[g == 0])
        for old, new in zip(stored, copies(p)[1:], strict=True):
            if old.numel() == N:
                assert torch.equal(new[256:512], old[256:512]) and not torch.equal(new, old)
            elif form != "32bit":
                assert new[1] == old[1] and not torch.equal(new, old)


@rule(
    "last-block",
    "The last block of a parameter uses its own elements only.",
    "Parameters with fewer than `min_8bit_size` elements (4096) keep f32 states.",
)
def test_last_block_and_small_parameters(device):
    params = [nn.Parameter(torch.randn(n, device=device)) for n in (4095, 4096, 4100)]
    for p in params:
        p.grad = torch.ones_like(p)
    params[2].grad[4096:] = 1e-3
    optimizer = bnb.optim.Adam8bit(params)
    optimizer.step()
    dtypes = [optimizer.state[p]["state1"].dtype for p in params]
    assert dtypes == [torch.float32, torch.uint8, torch.uint8]
    scales = optimizer.state[params[2]]["absmax1"]
    torch.testing.assert_close(scales[-2:], torch.tensor([0.1, 1e-4], device=device))


# --- the other rules ------------------------------------------------------------------------------


@rule(
    "ademamix",
    "As Adam, with a second average m2 and the corrections on either side of the sum:",
    "m2 <- fma(m2, beta3_t, g * (1 - beta3_t))",
    "p <- fma(-lr * c2, fma(m2, alpha_t, m * (1 / c1)) / (sqrt(v) + eps_t), p)",
    "alpha_t = alpha * min(t / t_alpha, 1)",
    "beta3_t = min(exp(ln beta1 ln beta3 / ((1 - s) ln beta3 + s ln beta1)), beta3), s = t / "
    "t_beta3",
    "`state1` holds m and m2 as two rows, each with its own scales; both use the signed map.",
)
@pytest.mark.parametrize("form", ["32bit", "8bit_blockwise"])
def test_ademamix(device, form):
    h = reference.Hyper(lr=1e-2, weight_decay=0.1, t_alpha=4, t_beta3=4)
    p = make("ademamix", form, device)
    for taken in range(6):  # the schedules end after four
        step(p, h, taken)
    assert p.states[0].shape == (2, N) and p.states[1].shape == (N,)
    if form != "32bit":
        assert (p.scales[0] > 0).all() and not torch.equal(*p.scales[0])


@rule(
    "one-state",
    "Their one state uses the signed map. Everything said of Adam's elements, blocks and devices "
    "holds.",
    "Lion p <- p * (1 - lr * weight_decay) before the update p <- fma(-lr, sign(fma(m, beta1, g * "
    "(1 - beta1))), p) sign(0) = 0 m <- fma(m, beta2, g * (1 - beta2))",
    "SGD g <- fma(weight_decay, p, g) m <- g in the first step, else fma(m, momentum, g) p <- "
    "fma(-lr, m, p)",
    "RMSprop g <- fma(weight_decay, p, g) v <- fma(v, alpha, (g * g) * (1 - alpha)) p <- fma(-lr, "
    "g / (sqrt(v) + eps), p)",
    "Adagrad as RMSprop with v <- fma(g, g, v)",
)
@pytest.mark.parametrize("name", ["lion", "momentum", "rmsprop", "adagrad"])
@pytest.mark.parametrize("form", ["32bit", "8bit_blockwise"])
def test_rules_with_one_state(device, name, form):
    p = make(name, form, device)
    for taken in range(3):
        g = gradient(p.param)
        g[5] = 0.0
        before = p.param[5].item()
        step(p, taken=taken, g=g)
        if name == "lion":  # the state is 0, too
            assert p.param[5].item() == f32(before) * f32(1 - HYPER.lr * HYPER.weight_decay)
        if form != "32bit":
            g[7] = NAN
            before = p.param[7].clone()
            call("dispatched", [p], [g], HYPER, taken)
            assert p.param[7] == before and p.states[0][7] == ZERO


@rule(
    "bounds",
    "LAMB is Adam and LARS is SGD, with a bound; every rule takes one.",
    "p moves by -lr * d * min(1, max_unorm * |p| / |d|) |p| = 0: no bound",
    "Elements that stand still count as d = 0. `unorm_vec` receives |d|^2.",
)
@pytest.mark.parametrize("name", ["adam", "momentum", "lion"])
def test_bounds(device, name):
    h = reference.Hyper(lr=1e-2)
    unorm = torch.zeros(1, device=device)
    for form in ("32bit", "8bit_blockwise"):
        p = make(name, form, device)
        g = gradient(p.param)
        g[: N // 2] = 0
        before = numpy(p.param).copy()
        options = {"max_unorm": 0.1, "skip_zeros": True, "unorm": unorm}
        step(p, h, g=g, **options)
        moved = np.linalg.norm(numpy(p.param) - before)
        np.testing.assert_allclose(moved, h.lr * 0.1 * np.linalg.norm(before), rtol=1e-3)
        want = reference.advance(
            name, h, before, numpy(g), [np.zeros(N)] * len(p.states), 1, skip_zeros=True
        )
        np.testing.assert_allclose(unorm.item(), np.sum(want.update**2), rtol=1e-4)
        p = make(name, form, device)
        p.param.zero_()
        step(p, h, g=g, **options)
        np.testing.assert_allclose(numpy(p.param), -h.lr * want.update, rtol=1e-4)


@rule(
    "tensor-wise",
    "what is said of 8-bit states holds with the tensor for the block.",
    "A tensor of which every element is skipped keeps its scale and its codes.",
)
def test_one_scale_per_tensor(device):
    p = make("adam", "8bit", device)
    for taken in range(3):
        step(p, taken=taken)
    before = copies(p)
    call("dispatched", [p], [torch.zeros(N, device=device)], HYPER, 3, skip_zeros=True)
    assert_same(before, p)


# --- percentile clipping --------------------------------------------------------------------------


def clip(history, norm, t, percentile, device):
    """Norm, clip value and factor of a gradient of this norm in step t."""
    g = torch.zeros(300, device=device)
    g[7] = norm
    taken = torch.tensor(t - 1, device=device)
    return ops.percentile_clipping_step([g], [history], taken, percentile)[:, 0].tolist()


@rule(
    "percentile-clipping",
    "s[t mod 100] = |g|^2 of each parameter; all hundred in the first step",
    "clip = sqrt(the p-th smallest of s, counted from 0)",
    "g <- g * (clip / |g| if |g| > clip, else 1)",
    "The history is f32.",
)
def test_percentile_clipping(device):
    history = torch.zeros(100, device=device)
    assert clip(history, 3.0, 1, 5, device) == [3, 3, 1]
    assert (history == 9).all()
    for t in range(2, 120):
        norm, found, factor = clip(history, float(t), t, 5, device)
        assert history[t % 100] == t * t
        want = np.sqrt(np.sort(numpy(history)))[5]
        assert norm == t and found == want
        assert factor == (want / f32(t) if t > want else 1)
    assert clip(history, 0.5, 120, 99, device)[1:] == [119, 1]


@rule(
    "percentile-clipping",
    "A norm that is not finite is not recorded, and its gradient is not scaled; the first finite "
    "norm fills the history.",
    "A norm of zero is recorded; but a history of zeros only is an empty one, and the next norm "
    "fills it.",
)
def test_percentile_clipping_of_unusual_norms(device):
    history = torch.zeros(100, device=device)
    for t, norm in ((1, INF), (2, NAN)):
        assert clip(history, norm, t, 5, device)[2] == 1 and not history.any()
    clip(history, 2.0, 3, 5, device)
    assert (history == 4).all()
    before = history.clone()
    assert clip(history, INF, 4, 5, device)[2] == 1 and torch.equal(history, before)
    clip(history, 0.0, 5, 5, device)
    assert history[5] == 0 and (history == 4).sum() == 99
    history.zero_()
    clip(history, 0.0, 6, 5, device)
    assert not history.any()
    clip(history, 3.0, 7, 5, device)
    assert (history == 9).all()


# --- stochastic rounding --------------------------------------------------------------------------


@rule(
    "stochastic-parameters",
    "the f32 result gets 16 random bits added below its upper half, and the lower half is dropped.",
    "NaN and infinity stay.",
    "The bits are those of Philox4x32-10 (Salmon et al. 2011) with the key `rounding_seed` and the "
    "counter (group, group >> 32, tensor, t): group is the index of the element over 8, tensor its "
    "place in the list of the call; element e of a group takes the lower half of word e / 2 if e "
    "is even, else the upper one. They are the same on every device.",
)
def test_stochastic_rounding_of_parameters(device):
    rounded = [make("adam", "32bit", device, n, torch.bfloat16) for n in (5, N)]
    exact = [make("adam", "32bit", device, n) for n in (5, N)]
    rounded[1].param[:3] = torch.tensor([NAN, INF, -INF])
    for a, b in zip(exact, rounded, strict=True):
        a.param.copy_(b.param)
    grads = [gradient(p.param) for p in rounded]
    call("dispatched", rounded, grads, HYPER, 6, rounding_seed=-7)
    call("dispatched", exact, [g.float() for g in grads], HYPER, 6)
    for place, (a, b) in enumerate(zip(exact, rounded, strict=True)):
        bits = rounding.bits(a.param.numel(), -7, place, 7)
        np.testing.assert_array_equal(numpy(b.param), rounding.round_up(numpy(a.param), bits))
    np.testing.assert_array_equal(numpy(rounded[1].param[:3]), [NAN, INF, -INF])
