# SPDX-License-Identifier: MIT
"""Lion, SGD, RMSprop and Adagrad: against the specification, recordings and torch."""

import numpy as np
import pytest
import torch
from closeness import DTYPES, ROUNDING, U
from closeness import numpy as numbers
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.plain import optimizer as plain
from reference import codes
from reference import optim as reference

ops = torch.ops.bitsandbytes
# Rule, class prefix, constructor arguments of the recordings.
RULES = {
    "lion": ("Lion", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "rmsprop": ("RMSprop", {}),
    "adagrad": ("Adagrad", {}),
}
HYPER = {
    "lion": reference.Hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=0.0),
    "momentum": reference.Hyper(lr=1e-2, beta1=0.9, beta2=0.0, eps=0.0),
    "rmsprop": reference.Hyper(lr=1e-2, beta1=0.99, beta2=0.0, eps=1e-8),
    "adagrad": reference.Hyper(lr=1e-2, beta1=0.0, beta2=0.0, eps=1e-10),
}


@pytest.fixture(params=["dispatched", "plain"])
def step_ops(request):
    return plain if request.param == "plain" else ops


def gradient(n, dtype, device):
    return (torch.randn(n) * torch.randn(n).mul(2).exp2() * 1e-2).to(dtype).to(device)


def hyper_args(h, steps_taken, device, skip_zeros=False):
    step = torch.tensor(steps_taken, device=device)
    return (step, None, h.lr, h.beta1, h.beta2, 0.0, 0.0, h.eps, h.weight_decay, 1.0, skip_zeros)


def with_decay(h, weight_decay):
    return reference.Hyper(h.lr, h.beta1, h.beta2, h.eps, weight_decay)


def assert_parameter(actual, want, old, gradients, dtype):
    """At most 16 roundings of the step, three of the parameter, one to its dtype.

    `gradients`: relative size of the terms of a decayed gradient, which may cancel.
    """
    relative, absolute = ROUNDING[dtype]
    moved = np.abs(want - old) * gradients
    bound = 16 * U * moved + (3 * U + relative) * np.abs(want) + 2.0**-24 * 1e-2 + absolute
    assert (np.abs(numbers(actual) - want) <= bound).all()


def terms(h, p, g):
    """How many times larger the terms of g + wd p are than their sum."""
    total = np.abs(g + h.weight_decay * p)
    return (np.abs(g) + np.abs(h.weight_decay * p)) / np.maximum(total, 1e-30)


def decided(rule, h, p, g, m):
    """Elements whose direction float32 arithmetic cannot turn around (Lion's sign)."""
    if rule != "lion":
        return np.ones_like(g, bool)
    average = h.beta1 * m + (1 - h.beta1) * g
    return np.abs(average) > 4 * U * (h.beta1 * np.abs(m) + (1 - h.beta1) * np.abs(g))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("steps_taken", [0, 4])
def test_32bit_op_matches_specification(step_ops, device, rule, dtype, weight_decay, steps_taken):
    h = with_decay(HYPER[rule], weight_decay)
    n = 1003
    p = torch.randn(n).to(dtype).to(device)
    g = gradient(n, dtype, device)
    state = torch.randn(n).to(device) * 0.01
    if rule in ("rmsprop", "adagrad"):
        state = state.abs()
    p0, g0, s0 = (numbers(t).astype(np.float64) for t in (p, g, state))
    step_ops.optimizer_step_32bit(rule, [p], [g], [state], [], *hyper_args(h, steps_taken, device))
    stepped = reference.advance(rule, h, p0, g0, (s0,), steps_taken + 1)
    want, (want_state,) = stepped.param, stepped.states
    cancel = terms(h, p0, g0) if rule != "lion" else np.ones(n)
    scale = np.abs(s0) + np.abs(g0) + np.abs(h.weight_decay * p0)
    scale = scale if rule in ("lion", "momentum") else np.abs(want_state) * cancel**2
    assert (np.abs(numbers(state) - want_state) <= 8 * U * scale).all()
    sure = decided(rule, h, p0, g0, s0)
    old = p0 if rule != "lion" else p0 * (1 - h.lr * weight_decay)
    assert_parameter(p.cpu()[sure], want[sure], old[sure], cancel[sure], dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_8bit_op_equals_32bit_op_between_quantizations(step_ops, device, rule, dtype, n):
    # The 8-bit step is the 32-bit step on decoded states, then the quantizer; both are held to the
    # specification elsewhere. So they must agree bit for bit.
    h = HYPER[rule]
    signed = bnb.functional.create_dynamic_map().to(device)
    start = torch.randn(n).to(device) * 0.01
    if rule in ("rmsprop", "adagrad"):
        start = start.abs()
    state8, absmax = ops.quantize_blockwise(start, signed, 256)
    state32 = ops.dequantize_blockwise(state8, absmax, signed, 256, torch.float32)
    p8 = torch.randn(n).to(dtype).to(device)
    p32 = p8.clone()
    g = gradient(n, dtype, device)
    args = hyper_args(h, 3, device)
    step_ops.optimizer_step_8bit_blockwise(
        rule, [p8], [g], [state8], [], [absmax], [], signed, None, *args
    )
    step_ops.optimizer_step_32bit(rule, [p32], [g], [state32], [], *args)
    assert torch.equal(p8, p32)
    want, want_absmax = codes.quantize(
        reference.SIGNED, numbers(state32), reference.BLOCK, keep_sign=True
    )
    assert np.array_equal(state8.cpu().numpy(), want)
    assert np.array_equal(numbers(absmax), want_absmax)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(cpu_isa, rule, bits, dtype):
    h = with_decay(HYPER[rule], 0.1)
    torch.manual_seed(3)
    results = []
    for call in (ops, plain):
        torch.manual_seed(3)
        n = 777
        p, g = torch.randn(n).to(dtype), gradient(n, dtype, "cpu")
        state = torch.rand(n) * 0.01
        args = hyper_args(h, 2, "cpu")
        if bits == 32:
            call.optimizer_step_32bit(rule, [p], [g], [state], [], *args)
            results.append(state)
        else:
            signed = bnb.functional.create_dynamic_map()
            state, absmax = ops.quantize_blockwise(state, signed, 256)
            call.optimizer_step_8bit_blockwise(
                rule, [p], [g], [state], [], [absmax], [], signed, None, *args
            )
            results.append(state)
    if bits == 32:
        # Plain PyTorch has no fused multiply-add: two roundings apart.
        torch.testing.assert_close(*results, rtol=8 * U, atol=8 * U * 0.02)
    else:
        assert (results[0].int() - results[1].int()).abs().max() <= 1
        assert (results[0] == results[1]).float().mean() >= 0.99


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_recording(device, golden, rule, bits, dtype):
    prefix, kwargs = RULES[rule]
    name = f"{prefix}{bits}bit"
    recorded = {key: tensor.to(device) for key, tensor in golden("one_state").items()}
    kind = str(dtype).removeprefix("torch.")
    if f"{kind}.{name}.state1" not in recorded:
        pytest.skip("the recorded implementation has no bfloat16 for this rule")
    if name == "Lion8bit":
        kwargs = {"weight_decay": 0.05}
    inputs = {key: tensor.to(device) for key, tensor in golden("adam").items()}
    p = nn.Parameter(inputs["p0.1"].to(dtype, copy=True))
    opt = getattr(bnb.optim, name)([p], lr=1e-2, **kwargs)
    for step in range(1, 11):
        p.grad = inputs[f"g{step - 1}.1"].to(dtype)
        opt.step()
        if step in (1, 10):
            want = recorded[f"{kind}.{name}.step{step}"].float()
            error = (p.detach().float() - want).abs()
            moved = (want - inputs["p0.1"].to(dtype).float()).abs()
            if dtype == torch.float32:
                limit = 0.01 * torch.maximum(moved, torch.tensor(1e-2))
            else:
                # The recorded kernel rounds lr and each stage to bfloat16.
                limit = step * 2.0**-7 * (want.abs() + moved + 1e-2)
            # A sum next to zero may get either sign, and Lion steps by the sign alone.
            allowed = 0.001 if rule == "lion" else 0.0
            assert (error > limit).float().mean() <= allowed
    state = opt.state[p]
    want = recorded[f"{kind}.{name}.state1"]
    if bits == 8:
        difference = (state["state1"].int() - want.int()).abs()
        assert difference.max() <= 1 and (difference == 0).float().mean() >= 0.999
        torch.testing.assert_close(
            state["absmax1"], recorded[f"{kind}.{name}.absmax1"], rtol=1e-6, atol=0
        )
    else:
        scale = want.abs().max().item()
        torch.testing.assert_close(state["state1"], want, rtol=40 * U, atol=40 * U * scale)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad"])
def test_32bit_equals_torch(device, name, weight_decay):
    kwargs = {"lr": 1e-2, "weight_decay": weight_decay}
    if name == "SGD":
        kwargs["momentum"] = 0.9
    torch.manual_seed(0)
    start = torch.randn(50, 30).to(device)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = getattr(bnb.optim, name)([ours], **kwargs)
    b = getattr(torch.optim, name)([theirs], **kwargs)
    for _ in range(20):
        ours.grad = torch.randn(50, 30).to(device)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [8, 32])
def test_trains_a_regression(device, rule, bits):
    torch.manual_seed(0)
    prefix, kwargs = RULES[rule]
    target = torch.randn(64, 64, device=device)
    weight = nn.Parameter(torch.zeros(64, 64, device=device))
    lr = {"lion": 1e-2, "momentum": 20.0, "rmsprop": 1e-2, "adagrad": 0.3}[rule]
    opt = getattr(bnb.optim, prefix)([weight], lr=lr, optim_bits=bits, **kwargs)
    for _ in range(300):
        opt.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        opt.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [8, 32])
def test_state_layout(rule, bits):
    prefix, kwargs = RULES[rule]
    p = nn.Parameter(torch.randn(64, 64))
    opt = getattr(bnb.optim, f"{prefix}{bits}bit")([p], lr=1e-3, **kwargs)
    p.grad = torch.randn(64, 64)
    opt.step()
    expected = ["step", "state1"] + (["qmap1", "absmax1"] if bits == 8 else [])
    assert list(opt.state[p]) == expected
    assert opt.optimizer_name == rule
    assert "bitsandbytes" in str(type(opt))
    restored = getattr(bnb.optim, f"{prefix}{bits}bit")([p], lr=1e-3, **kwargs)
    restored.load_state_dict(opt.state_dict())
    assert torch.equal(restored.state[p]["state1"], opt.state[p]["state1"])


def test_constructors_refuse_what_has_no_meaning():
    p = [nn.Parameter(torch.randn(3))]
    for make in (
        lambda: bnb.optim.SGD(p, lr=0.1),
        lambda: bnb.optim.SGD8bit(p, lr=0.1, momentum=0),
        lambda: bnb.optim.RMSprop(p, alpha=0),
        lambda: bnb.optim.RMSprop8bit(p, centered=True),
    ):
        with pytest.raises(NotImplementedError, match="must"):
            make()
    for make in (
        lambda: bnb.optim.Adagrad(p, lr_decay=0.1),
        lambda: bnb.optim.Adagrad8bit(p, initial_accumulator_value=1),
        lambda: bnb.optim.Adagrad8bit(p, optim_bits=32),
        lambda: bnb.optim.Lion(p, lr=-1),
        lambda: bnb.optim.Lion(p, betas=(1.0, 0.9)),
        lambda: bnb.optim.SGD(p, lr=0.1, momentum=1.0),
    ):
        with pytest.raises(ValueError, match="must"):
            make()
    for make in (
        lambda: bnb.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda: bnb.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda: bnb.optim.RMSprop(p, momentum=0.5),
    ):
        with pytest.warns(UserWarning, match="ignored"):
            make()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [8, 32])
def test_graph_replay_equals_eager(device, rule, bits):
    if device != "cuda":
        pytest.skip("CUDA graphs exist on CUDA only")
    prefix, kwargs = RULES[rule]
    torch.manual_seed(0)
    start = torch.randn(5000, device=device)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        getattr(bnb.optim, prefix)([p], lr=1e-2, optim_bits=bits, **kwargs) for p in params
    ]
    for p, opt in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for _ in range(5):
        g = torch.randn_like(start)
        for p in params:
            p.grad.copy_(g)
        graph.replay()
        optimizers[1].step()
    assert torch.equal(params[0], params[1])
    assert optimizers[0].state[params[0]]["step"] == 6
