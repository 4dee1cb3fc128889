# SPDX-License-Identifier: MIT
"""Functional optimizer steps: the calls of every release, against the list ops behind them."""

import copy
import inspect
import types

import pytest
import torch
from optim_helpers import parameter

import bitsandbytes as bnb
import bitsandbytes.functional as F

RULES = {"adam": 2, "lamb": 2, "momentum": 1, "lars": 1, "lion": 1, "rmsprop": 1, "adagrad": 1}
CLASSES = {
    "adam": ("Adam", {}),
    "lamb": ("LAMB", {"max_unorm": 0.5}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "lars": ("LARS", {"momentum": 0.9, "max_unorm": 0.5}),
    "lion": ("Lion", {}),
    "rmsprop": ("RMSprop", {}),
    "adagrad": ("Adagrad", {}),
    "ademamix": ("AdEMAMix", {}),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def optimizer(rule, p, bits, **kwargs):
    name, own = CLASSES[rule]
    return getattr(bnb.optim, name)([p], lr=1e-2, optim_bits=bits, **{**own, **kwargs})


def hyper(opt):
    group = opt.param_groups[0]
    betas = (*group["betas"], 0.0)
    return {
        "beta1": betas[0],
        "beta2": betas[1],
        "beta3": betas[2],
        "alpha": group.get("alpha", 0.0),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "lr": group["lr"],
    }


def advanced(opt, p, n=3):
    """`p` and its state after some steps, and a gradient for the next."""
    for _ in range(n):
        p.grad = torch.randn_like(p)
        opt.step()
    q, state = p.detach().clone(), copy.deepcopy(dict(opt.state[p]))
    p.grad = torch.randn_like(p)
    return q, p.grad.clone(), state


def assert_states(opt, p, state):
    for key, value in opt.state[p].items():
        if torch.is_tensor(value):
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_32bit(device, rule, dtype):
    p = parameter(60, 70, dtype=dtype, device=device)
    opt = optimizer(rule, p, 32)
    q, g, state = advanced(opt, p)
    bound = {k: v for k, v in CLASSES[rule][1].items() if k == "max_unorm"}
    F.optimizer_update_32bit(
        rule,
        g,
        q,
        state["state1"],
        step=state["step"] + 1,
        state2=state.get("state2"),
        unorm_vec=state.get("unorm_vec"),
        **hyper(opt),
        **bound,
    )
    opt.step()
    assert torch.equal(p, q)
    assert_states(opt, p, state)


@pytest.mark.parametrize("rule", [rule for rule in CLASSES if rule not in ("lamb", "lars")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_blockwise(device, rule, dtype):
    p = parameter(60, 70, dtype=dtype, device=device)
    opt = optimizer(rule, p, 8)
    q, g, state = advanced(opt, p)
    F.optimizer_update_8bit_blockwise(
        rule,
        g,
        q,
        state["state1"],
        state.get("state2"),
        step=state["step"] + 1,
        qmap1=state["qmap1"],
        qmap2=state.get("qmap2"),
        absmax1=state["absmax1"],
        absmax2=state.get("absmax2"),
        **hyper(opt),
    )
    opt.step()
    assert torch.equal(p, q)
    assert_states(opt, p, state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_tensor_wise(device, rule, dtype):
    p = parameter(60, 70, dtype=dtype, device=device)
    opt = optimizer(rule, p, 8, block_wise=False)
    q, g, state = advanced(opt, p)
    settings = {k: v for k, v in hyper(opt).items() if k not in ("beta3", "alpha")}
    bound = {k: v for k, v in CLASSES[rule][1].items() if k == "max_unorm"}
    F.optimizer_update_8bit(
        rule,
        g,
        q,
        state["state1"],
        state.get("state2"),
        step=state["step"] + 1,
        qmap1=state["qmap1"],
        qmap2=state.get("qmap2"),
        max1=state["max1"],
        max2=state.get("max2"),
        new_max1=state["new_max1"],
        new_max2=state.get("new_max2"),
        unorm_vec=state.get("unorm_vec"),
        **settings,
        **bound,
    )
    opt.step()
    assert torch.equal(p, q)
    for i in (1, 2)[: RULES[rule]]:
        state[f"max{i}"] = state[f"new_max{i}"]  # the caller's part
    assert_states(opt, p, state)


def test_positions_of_release_50():
    names = {
        "optimizer_update_32bit": "optimizer_name g p state1 beta1 eps step lr state2 beta2 beta3 "
        "alpha weight_decay gnorm_scale unorm_vec max_unorm skip_zeros",
        "optimizer_update_8bit_blockwise": "optimizer_name g p state1 state2 beta1 beta2 beta3 "
        "alpha eps step lr qmap1 qmap2 absmax1 absmax2 weight_decay gnorm_scale skip_zeros",
        "optimizer_update_8bit": "optimizer_name g p state1 state2 beta1 beta2 eps step lr qmap1 "
        "qmap2 max1 max2 new_max1 new_max2 weight_decay gnorm_scale unorm_vec max_unorm",
        "percentile_clipping": "grad gnorm_vec step percentile",
    }
    for name, expected in names.items():
        assert list(inspect.signature(getattr(F, name)).parameters) == expected.split()


def test_keywords_of_old_releases():
    # 0.41 and older have neither beta3 nor alpha.
    p = parameter(5000)
    opt = optimizer("adam", p, 8)
    q, g, s = advanced(opt, p)
    keywords = {
        **{"optimizer_name": "adam", "g": g, "p": q, "state1": s["state1"], "state2": s["state2"]},
        **{"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 4, "lr": 1e-2},
        **{"qmap1": s["qmap1"], "qmap2": s["qmap2"]},
        **{"absmax1": s["absmax1"], "absmax2": s["absmax2"], "gnorm_scale": 1.0},
    }
    F.optimizer_update_8bit_blockwise(**keywords)
    opt.step()
    assert torch.equal(p, q)
    for name in ("eps", "step", "lr", "qmap1", "absmax1"):
        with pytest.raises(TypeError, match=name):
            F.optimizer_update_8bit_blockwise(
                **{k: v for k, v in keywords.items() if k != name},
            )


def test_numbers_that_lie_on_the_device(device):
    results = []
    for wrap in (float, lambda x: torch.tensor(x, device=device)):
        torch.manual_seed(0)
        p, g, m = torch.randn(99), torch.randn(99), torch.randn(99)
        p, g, m = p.to(device), g.to(device), m.to(device)
        F.optimizer_update_32bit(
            "momentum", g, p, m, 0.9, 0.0, 2, wrap(0.25), gnorm_scale=wrap(0.5)
        )
        results.append((p, m))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_leaves_that_require_gradients():
    p = parameter(50)
    old = p.detach().clone()
    F.optimizer_update_32bit("lion", torch.ones(50), p, torch.zeros(50), 0.9, 0.0, 1, 0.5)
    assert torch.equal(p, old - 0.5) and p.requires_grad


# --- the ops of the public package ---------------------------------------------------------------


def test_op_32bit_equals_the_function(device):
    p = parameter(60, 70, device=device)
    q, g, s = advanced(optimizer("lamb", p, 32), p)
    copies = copy.deepcopy((q, s))
    F.optimizer_update_32bit(
        *("lamb", g, q, s["state1"], 0.9, 1e-8, 4, 1e-2, s["state2"], 0.999),
        weight_decay=0.1,
        gnorm_scale=0.5,
        unorm_vec=s["unorm_vec"],
        max_unorm=0.01,
    )
    q2, s2 = copies
    norm = q2.norm().item()
    torch.ops.bitsandbytes.optimizer_update_32bit(
        *("lamb", g, q2, s2["state1"], s2["state2"], s2["unorm_vec"], 0.01, norm),
        *(0.9, 0.999, 0.0, 0.0, 1e-8, 0.1, 4, 1e-2, 0.5),
    )
    assert torch.equal(q, q2)
    for key in ("state1", "state2", "unorm_vec"):
        assert torch.equal(s[key], s2[key])
    assert s["unorm_vec"] > 0


def test_op_8bit_blockwise_equals_the_function(device):
    p = parameter(60, 70, device=device)
    q, g, s = advanced(optimizer("ademamix", p, 8), p)
    q2, s2 = copy.deepcopy((q, s))
    betas = (0.9, 0.999, 0.9999, 5.0, 1e-8, 4, 1e-2)
    for function, to, st in (
        (F.optimizer_update_8bit_blockwise, q, s),
        (torch.ops.bitsandbytes.optimizer_update_8bit_blockwise, q2, s2),
    ):
        keys = ("qmap1", "qmap2", "absmax1", "absmax2")
        states = (st["state1"], st["state2"])
        function("ademamix", g, to, *states, *betas, *(st[k] for k in keys), 0.1, 0.5)
    assert torch.equal(q, q2) and not torch.equal(q, p)
    for key in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(s[key], s2[key])


@pytest.mark.parametrize(
    ("what", "p", "message"),
    [
        ("numel", torch.empty(3, device="meta"), "g must be of 3 elements"),
        ("dtype", torch.empty(4, dtype=torch.half, device="meta"), "p must be torch.float32"),
    ],
)
def test_tracing_checks_the_arguments(what, p, message):
    g, s = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bitsandbytes.optimizer_update_32bit(
            *("lion", g, p, s, None, None, 0.0, 0.0, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0, 1, 0.1, 1.0)
        )


# --- devices -------------------------------------------------------------------------------------


def test_tensors_lie_on_one_device():
    here, there = torch.ones(2), torch.ones(2, device="meta")
    assert F.is_on_gpu([here, None, here]) is True
    with pytest.raises(RuntimeError, match=r"one device, got \['cpu', 'meta'\]"):
        F.is_on_gpu([here, there])
    paged = types.SimpleNamespace(is_paged=True, device=there.device)
    assert F.is_on_gpu([here, paged]) is True
    for call in (
        lambda t: F.optimizer_update_32bit("lion", t, here, here, 0.9, 0.0, 1, 0.1),
        lambda t: F.percentile_clipping(t, here, 1),
    ):
        with pytest.raises(RuntimeError, match="is_on_gpu"):
            call(torch.ones(2, device="meta"))


@pytest.mark.parametrize("step", [0, -1, -(2**63)])
def test_steps_before_the_first(step):
    p, g, m, v = (torch.ones(8) for _ in range(4))
    codes, levels, scale = torch.zeros(8, dtype=torch.uint8), torch.ones(256), torch.ones(1)
    numbers = {"eps": 1e-8, "step": step, "lr": 0.1}
    two = {"qmap1": levels, "qmap2": levels, "beta1": 0.9, "beta2": 0.9, **numbers}
    maxima = {"max1": scale, "max2": scale, "new_max1": scale, "new_max2": scale}
    with pytest.raises(ValueError, match=r"optimizer_update_32bit: step must be 1 or more"):
        F.optimizer_update_32bit("adam", g, p, m, 0.9, state2=v, **numbers)
    with pytest.raises(ValueError, match=r"optimizer_update_8bit_blockwise: step must be"):
        F.optimizer_update_8bit_blockwise(
            *("adam", g, p, codes, codes), absmax1=scale, absmax2=scale, **two
        )
    with pytest.raises(ValueError, match=r"optimizer_update_8bit: step must be 1 or more"):
        F.optimizer_update_8bit("adam", g, p, codes, codes, **two, **maxima)
    with pytest.raises(ValueError, match=r"percentile_clipping: step must be 1 or more"):
        F.percentile_clipping(g, torch.zeros(100), step)
    assert torch.equal(p, torch.ones(8))


@pytest.mark.parametrize("turned", ["params", "grads"])
def test_what_cannot_take_the_order_of_its_state(turned, device):
    straight, other = torch.randn(7, 4, device=device), torch.randn(4, 7, device=device).t()
    p, g = (other, straight) if turned == "params" else (straight, other)
    before = p.clone()
    state = torch.zeros(4, 7, device=device)
    with pytest.raises(
        RuntimeError, match=rf"{turned}\[0\] must have the shape of its state \[4, 7\]"
    ):
        F.optimizer_update_32bit("momentum", g, p, state, 0.9, 0.0, 1, 0.1)
    assert torch.equal(p, before) and not state.any()


# --- percentile clipping -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("percentile", [0, 5, 99])
def test_percentile_clipping(device, dtype, percentile):
    history = torch.zeros(100, device=device)
    squares = []
    for step in range(1, 106):
        g = torch.randn(70, device=device).mul(1 + step % 7).to(dtype)
        square = g.double().square().sum().item()
        squares = [square] * 100 if step == 1 else squares
        squares[step % 100] = square
        norm, clip, scale = F.percentile_clipping(g, history, step, percentile)
        want = sorted(squares)[percentile] ** 0.5
        assert norm.item() == pytest.approx(square**0.5, rel=1e-5)
        assert clip.item() == pytest.approx(want, rel=1e-5)
        assert scale.item() == pytest.approx(min(1.0, want / square**0.5), rel=1e-5)
        assert norm.shape == clip.shape == scale.shape == ()
    torch.testing.assert_close(history.cpu(), torch.tensor(squares), rtol=1e-5, atol=0)


def test_percentile_clipping_refuses():
    g, history = torch.ones(3), torch.zeros(100)
    for arguments in ((g.double(), history, 1), (g, history[:99], 1), (g, history, 1, 100)):
        with pytest.raises((RuntimeError, ValueError), match="percentile_clipping_step"):
            F.percentile_clipping(*arguments)
    assert not history.any()
