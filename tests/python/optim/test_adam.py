# SPDX-License-Identifier: MIT
"""Adam and AdamW: against the specification, recordings and torch, on every kind of parameter."""

import copy
import warnings

import numpy as np
import pytest
import torch
from closeness import DTYPES, ROUNDING, U, assert_close, assert_codes, gradient, numpy
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.plain import optimizer as plain
from reference import optim as reference

ops = torch.ops.bitsandbytes
INF, NAN = float("inf"), float("nan")
SIGNED, UNSIGNED = reference.SIGNED, reference.UNSIGNED


@pytest.fixture(params=["dispatched", "plain"])
def step_ops(request):
    """What the dispatcher runs on a device, and what runs where nothing is compiled."""
    return plain if request.param == "plain" else ops


def parameter(*shape, dtype=torch.float32, device="cpu"):
    return nn.Parameter(torch.randn(shape).to(dtype).to(device))


def optimizer(bits, params, **kwargs):
    return bnb.optim.Adam(params, optim_bits=bits, min_8bit_size=1, **kwargs)


def train(opt, params, steps, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = gradient(p)
        opt.step()
    return params


# --- against the specification -------------------------------------------------------------------
#
# One step from the same state: how far float32 arithmetic may be from float64, operation by
# operation, with every operation rounded to nearest (U):
#
#   m:  g (1 - beta1) and the sum                              2 U (beta1 |m0| + (1 - beta1) |g|)
#   v:  g^2, times (1 - beta2), the sum                        3 U v
#   d = m / (sqrt(v) + eps):  m above; sqrt of v 2.5 U; eps and the sum 2 U; the division U
#   step_size U; p - step_size d and the decay, its factor rounded: 3 U |p|
#
# A GPU's root and division are off by at most two units in the last place each: 8 U more. Hence
# 16 U of the step's size, and one rounding to the dtype of the parameter.


def sizes(h, g, m0):
    """Size of the terms of m, and of the terms of the step."""
    return h.beta1 * np.abs(np.float64(m0)) + (1 - h.beta1) * np.abs(np.float64(g))


def assert_parameter(p, want, v, m_terms, h, step, dtype):
    correction = h.lr / (1 - h.beta1**step)
    root = np.sqrt(v / (1 - h.beta2**step)) + h.eps
    moved = correction * m_terms / np.maximum(root, 1e-30)
    relative, absolute = ROUNDING[dtype]
    bound = 16 * U * moved + (3 * U + relative) * np.abs(want) + absolute
    np.testing.assert_array_less(np.abs(numpy(p).astype(np.float64) - want), bound * (1 + 1e-6))


def assert_step32(state1, state2, p, before, g, h, step, dtype):
    p0, m0, v0 = before
    want, m, v = reference.adam(h, p0, g, m0, v0, step)
    m_terms = sizes(h, g, m0)
    assert_close(state1, m, 2 * U * m_terms)
    assert_close(state2, v, 3 * U * v)
    assert_parameter(p, want, v, m_terms, h, step, dtype)


def assert_step8(state, p, before, g, h, step, dtype):
    p0, old = before
    want, _, (m, v) = old.advance(h, p0, g, step)
    m_terms = sizes(h, g, old.moments()[0])
    assert_codes(state["state1"], state["absmax1"], SIGNED, m, 2 * U * m_terms, True)
    assert_codes(state["state2"], state["absmax2"], UNSIGNED, v, 3 * U * v, False)
    assert_parameter(p, want, v, m_terms, h, step, dtype)


def hyper_args(h, step, device, *, lr_tensor=None, gnorm_scale=1.0, skip_zeros=False):
    number = torch.tensor(step - 1, device=device)  # the ops count the steps before theirs
    tail = (h.lr, h.beta1, h.beta2, 0.0, 0.0, h.eps, h.weight_decay, gnorm_scale, skip_zeros)
    return (number, lr_tensor, *tail)


def tables(device):
    return tuple(torch.from_numpy(levels.copy()).to(device) for levels in (SIGNED, UNSIGNED))


def random_state8(n, device):
    blocks = -(-n // 256)
    return {
        "state1": torch.randint(0, 256, (n,), dtype=torch.uint8, device=device),
        "state2": torch.randint(0, 256, (n,), dtype=torch.uint8, device=device),
        "absmax1": torch.rand(blocks, device=device) * 3,
        "absmax2": torch.rand(blocks, device=device),
    }


def reference_state(state):
    return reference.State8(
        *(numpy(state[k]).reshape(-1).copy() for k in ("state1", "state2", "absmax1", "absmax2"))
    )


def call8(functions, rule, tensors, grads, states, qmaps, *hyper):
    functions.optimizer_step_8bit_blockwise(
        rule,
        tensors,
        grads,
        *([state[key] for state in states] for key in ("state1", "state2", "absmax1", "absmax2")),
        *qmaps,
        *hyper,
    )


H = reference.Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
COUNTS = [1, 2, 255, 256, 257, 511, 512, 513, 1300]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", COUNTS)
def test_8bit_op_matches_specification(step_ops, device, dtype, n):
    p = torch.randn(n, device=device).to(dtype)
    g = gradient(p)
    state = random_state8(n, device)
    before = numpy(p).copy(), reference_state(state)
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper_args(H, 7, device))
    assert_step8(state, p, before, numpy(g), H, 7, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", COUNTS)
def test_32bit_op_matches_specification(step_ops, device, dtype, n):
    p = torch.randn(n, device=device).to(dtype)
    g = gradient(p)
    m, v = torch.randn(n, device=device), torch.rand(n, device=device)
    before = tuple(numpy(x).copy() for x in (p, m, v))
    step_ops.optimizer_step_32bit("adam", [p], [g], [m], [v], *hyper_args(H, 7, device))
    assert_step32(m, v, p, before, numpy(g), H, 7, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", COUNTS)
def test_every_instruction_set_gives_the_same_bits(cpu_isa, dtype, n):
    from bitsandbytes import _C

    generator = torch.Generator().manual_seed(n)
    p = torch.randn(n, generator=generator).to(dtype)
    g = torch.randn(n, generator=generator).to(dtype)
    start = random_state8(n, "cpu")
    m, v = torch.randn(n, generator=generator), torch.rand(n, generator=generator)

    def results(isa):
        _C.set_cpu_isa(isa)
        q, state = p.clone(), copy.deepcopy(start)
        call8(ops, "adam", [q], [g], [state], tables("cpu"), *hyper_args(H, 3, "cpu"))
        r, x, y = p.clone(), m.clone(), v.clone()
        ops.optimizer_step_32bit("adam", [r], [g], [x], [y], *hyper_args(H, 3, "cpu"))
        return [q, *state.values(), r, x, y]

    for a, b in zip(results("baseline"), results(cpu_isa), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_hundred_steps_match_specification(device, dtype, bits, weight_decay):
    h = reference.Hyper(lr=1e-2, weight_decay=weight_decay)
    p = parameter(700, dtype=dtype, device=device)
    opt = optimizer(bits, [p], lr=h.lr, weight_decay=weight_decay)
    before = None
    for step in range(1, 101):
        p0 = numpy(p).copy()
        if bits == 8:
            before = p0, reference_state(opt.state[p]) if step > 1 else reference.State8.zeros(700)
        else:
            names = ("state1", "state2")
            states = (numpy(opt.state[p][k]).copy() if step > 1 else np.zeros(700) for k in names)
            before = p0, *states
        p.grad = gradient(p)
        opt.step()
        state = opt.state[p]
        if bits == 8:
            assert_step8(state, p, before, numpy(p.grad), h, step, dtype)
        else:
            assert_step32(
                state["state1"], state["state2"], p, before, numpy(p.grad), h, step, dtype
            )


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.95, 0.0), (0.9, 0.9999)])
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_other_hyperparameters(step_ops, device, betas, eps):
    h = reference.Hyper(lr=3e-3, beta1=betas[0], beta2=betas[1], eps=eps)
    n = 300
    p, g = torch.randn(n, device=device), torch.randn(n, device=device)
    state = random_state8(n, device)
    m, v = torch.randn(n, device=device), torch.rand(n, device=device)
    q = p.clone()
    before8 = numpy(p).copy(), reference_state(state)
    before32 = tuple(numpy(x).copy() for x in (p, m, v))
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper_args(h, 2, device))
    step_ops.optimizer_step_32bit("adam", [q], [g], [m], [v], *hyper_args(h, 2, device))
    assert_step8(state, p, before8, numpy(g), h, 2, torch.float32)
    assert_step32(m, v, q, before32, numpy(g), h, 2, torch.float32)


def test_gradient_scale(step_ops, device):
    n = 300
    p, g = torch.randn(n, device=device), torch.randn(n, device=device)
    state = random_state8(n, device)
    before = numpy(p).copy(), reference_state(state)
    hyper = hyper_args(H, 2, device, gnorm_scale=0.25)
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper)
    assert_step8(state, p, before, numpy(g) / 4, H, 2, torch.float32)


def test_first_step_is_the_learning_rate(device):
    # m / c1 = g and sqrt(v / c2) = |g|, so the step is lr g / (|g| + eps).
    for bits in (8, 32):
        p = nn.Parameter(torch.zeros(300, device=device))
        opt = optimizer(bits, [p], lr=0.5, eps=0.0)
        p.grad = torch.randn(300, device=device)
        opt.step()
        # 1 - beta2 comes from a float32 beta2: off by 2^-25 / 1e-3, its root by half of that.
        torch.testing.assert_close(p.data, -0.5 * p.grad.sign(), rtol=2e-5, atol=0)


def test_element_without_any_gradient_stays_without_epsilon(step_ops, device):
    h = reference.Hyper(lr=1e-2, eps=0.0)
    p, g = torch.ones(300, device=device), torch.zeros(300, device=device)
    g[7] = 1.0
    state = {key: torch.zeros_like(value) for key, value in random_state8(300, device).items()}
    m, v, q = torch.zeros_like(p), torch.zeros_like(p), p.clone()
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper_args(h, 1, device))
    step_ops.optimizer_step_32bit("adam", [q], [g], [m], [v], *hyper_args(h, 1, device))
    for result in (p, q):
        assert (result == 1).sum() == 299 and result[7] < 1


def test_negative_momentum_keeps_its_sign(step_ops, device):
    h = reference.Hyper(lr=1e-2)
    p, g = torch.zeros(256, device=device), torch.zeros(256, device=device)
    g[0], g[1], g[2] = 1.0, -1e-12, 1e-12
    state = {key: torch.zeros_like(value) for key, value in random_state8(256, device).items()}
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper_args(h, 1, device))
    assert state["state1"][:4].tolist() == [255, 126, 127, 127]
    assert state["state2"][:4].tolist() == [255, 0, 0, 0]


@pytest.mark.parametrize("bits", [8, 32])
def test_a_list_is_its_parameters_one_by_one(device, bits):
    shapes = [(3,), (256,), (17, 31), (1000,), (1,), (0,), (2, 3, 4)]
    together = [parameter(*shape, device=device) for shape in shapes]
    alone = copy.deepcopy(together)
    opt = optimizer(bits, together, lr=1e-2)
    opts = [optimizer(bits, [p], lr=1e-2) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = gradient(p)
            q.grad = p.grad.clone()
        opt.step()
        for single in opts:
            single.step()
    for p, q, single in zip(together, alone, opts, strict=True):
        assert torch.equal(p, q)
        for key, value in opt.state[p].items():
            other = single.state[q][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other


@pytest.mark.parametrize("bits", [8, 32])
def test_mixed_dtypes_in_one_optimizer(device, bits):
    together = [parameter(300, dtype=dtype, device=device) for dtype in DTYPES * 2]
    alone = copy.deepcopy(together)
    train(optimizer(bits, together, lr=1e-2), together, 3)
    opts = [optimizer(bits, [p], lr=1e-2) for p in alone]
    torch.manual_seed(0)
    for _ in range(3):
        for p, opt in zip(alone, opts, strict=True):
            p.grad = gradient(p)
            opt.step()
    for p, q in zip(together, alone, strict=True):
        assert p.dtype == q.dtype and torch.equal(p, q)


@pytest.mark.parametrize("bits", [8, 32])
def test_threads_do_not_change_the_result(bits):
    starts = torch.randn(200_003), torch.randn(3000)
    grads = [[torch.randn(p.shape) for p in starts] for _ in range(2)]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        params = [nn.Parameter(start.clone()) for start in starts]
        opt = optimizer(bits, params, lr=1e-2)
        torch.set_num_threads(threads)
        try:
            for step in grads:
                for p, g in zip(params, step, strict=True):
                    p.grad = g
                opt.step()
        finally:
            torch.set_num_threads(before)
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- recordings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Adam32bit", "AdamW32bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_recording(device, golden, name, dtype):
    # Blocks 16 to 32 of a tensor of 8269 elements, and a tensor of 100, which stays in 32 bits.
    tensors = {key: tensor.to(device) for key, tensor in golden("adam").items()}
    decay = {"weight_decay": 0.1} if "W" in name else {}
    members = (1, 2)
    params = [nn.Parameter(tensors[f"p0.{i}"].to(dtype, copy=True)) for i in members]
    opt = getattr(bnb.optim, name)(params, lr=1e-2, **decay)
    prefix = str(dtype).removeprefix("torch.")
    for step in range(1, 11):
        for i, p in zip(members, params, strict=True):
            p.grad = tensors[f"g{step - 1}.{i}"].to(dtype)
        opt.step()
        if step not in (1, 5, 10):
            continue
        for i, p in zip(members, params, strict=True):
            recorded = tensors[f"{prefix}.{name}.step{step}.{i}"]
            assert_like_recording(p.detach(), recorded, tensors[f"p0.{i}"].to(dtype), step, name)
    for i, p in zip(members, params, strict=True):
        state = opt.state[p]
        bits = 8 if "8bit" in name and i == 1 else 32
        assert (state["state1"].dtype == torch.uint8) == (bits == 8)
        for key in ("state1", "state2"):
            recorded = tensors[f"{prefix}.state{bits}.{i}.{key}"]
            if bits == 8:
                difference = (state[key].int() - recorded.int()).abs()
                assert difference.max() <= 1
                assert (difference == 0).float().mean() >= 0.999
            else:
                # Ten steps of at most three roundings each.
                scale = recorded.abs().max().item()
                torch.testing.assert_close(state[key], recorded, rtol=30 * U, atol=30 * U * scale)
        if bits == 8:
            for key in ("absmax1", "absmax2"):
                recorded = tensors[f"{prefix}.state8.{i}.{key}"]
                torch.testing.assert_close(state[key], recorded, rtol=1e-6, atol=0)


def assert_like_recording(p, recorded, start, step, name):
    lr = 1e-2
    error = (p.float() - recorded.float()).abs()
    moved = (recorded.float() - start.float()).abs()
    if p.dtype == torch.float32:
        # 1 % of a step: of lr, or of what the element moved where its second moment was quantized
        # to almost nothing and its step is many times lr.
        assert (error <= 0.01 * torch.maximum(moved, torch.tensor(lr))).all()
        assert error.mean() <= 1e-3 * lr
        return
    # Spacing of bfloat16 numbers at the largest value on the way: 2^-7 of it at most.
    ulp = 2.0**-7 * (torch.maximum(start.float().abs(), recorded.float().abs()) + step * lr)
    if "W" in name:
        # The recorded kernel rounds before its decay and after it, this one once: they part by up
        # to one and a half units in the last place at every step.
        assert (error <= 1.5 * step * ulp).all()
    else:
        assert (error <= ulp).all()
        assert (error > 0).float().mean() <= 0.01


# --- against torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("cls", [bnb.optim.Adam, bnb.optim.AdamW])
def test_32bit_equals_torch_adamw(device, cls, weight_decay):
    steps, lr = 100, 1e-3
    p = parameter(4000, device=device)
    q = nn.Parameter(p.detach().double())
    opt = cls([p], lr=lr, weight_decay=weight_decay)
    exact = torch.optim.AdamW([q], lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        p.grad = gradient(p)
        q.grad = p.grad.double()
        opt.step()
        exact.step()
    # Per step: two roundings of p; 2e-5 of the step, because 1 - beta2 comes from a float32 beta2;
    # and torch's decay does not see the step before, which is lr weight_decay of it. A step is at
    # most (1 - beta1) / sqrt(1 - beta2) = 3.2 lr once its corrections have died away.
    largest = 3.2 * lr
    bound = steps * (2 * U * q.abs() + largest * (2e-5 + lr * weight_decay))
    assert ((p.double() - q).abs() <= bound).all()
    assert (p.double() - q).abs().max() < (q - 0).abs().max()


def test_8bit_follows_32bit(device):
    p = parameter(64, 128, device=device)
    q = copy.deepcopy(p)
    train(bnb.optim.AdamW8bit([p], lr=1e-3), [p], 50)
    train(bnb.optim.AdamW32bit([q], lr=1e-3), [q], 50)
    assert 0 < (p - q).abs().mean() < 0.1 * 1e-3 * 50


@pytest.mark.parametrize("bits", [8, 32])
def test_trains_a_regression(device, bits):
    x = torch.randn(256, 32, device=device)
    y = x @ torch.randn(32, 16, device=device)
    model = nn.Linear(32, 16).to(device)
    opt = optimizer(bits, model.parameters(), lr=3e-2)
    losses = []
    for _ in range(150):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


# --- groups, learning rates ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_groups_have_settings_of_their_own(device, bits):
    settings = [
        {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.0},
        {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.2},
    ]
    params = [parameter(300, device=device) for _ in settings]
    alone = copy.deepcopy(params)
    groups = [{"params": [p], **kw} for p, kw in zip(params, settings, strict=True)]
    opt = optimizer(bits, groups)
    opts = [optimizer(bits, [p], **kw) for p, kw in zip(alone, settings, strict=True)]
    for _ in range(3):
        for p, q, single in zip(params, alone, opts, strict=True):
            p.grad = gradient(p)
            q.grad = p.grad.clone()
            single.step()
        opt.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("bits", [8, 32])
def test_learning_rate_schedule(device, bits):
    p = parameter(300, device=device)
    q = copy.deepcopy(p)
    opt, manual = optimizer(bits, [p], lr=0.1), optimizer(bits, [q], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    for epoch in range(4):
        p.grad = gradient(p)
        q.grad = p.grad.clone()
        manual.param_groups[0]["lr"] = 0.1 * 0.5**epoch
        opt.step()
        schedule.step()
        manual.step()
        assert torch.equal(p, q)
    assert opt.param_groups[0]["lr"] == 0.1 * 0.5**4


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["parameter", "cpu"])
def test_learning_rate_as_a_tensor(device, bits, dtype, where):
    rates = [0.25, 0.5, 0.0625]  # exact in every dtype
    p = parameter(300, device=device)
    q = copy.deepcopy(p)
    lr = torch.tensor(0.25, dtype=dtype, device=device if where == "parameter" else "cpu")
    opt = optimizer(bits, [p], lr=lr, weight_decay=0.5)
    manual = optimizer(bits, [q], lr=0.25, weight_decay=0.5)
    for rate in rates:
        lr.fill_(rate)  # what a scheduler does with a tensor
        manual.param_groups[0]["lr"] = rate
        p.grad = gradient(p)
        q.grad = p.grad.clone()
        opt.step()
        manual.step()
        assert torch.equal(p, q)
    assert opt.param_groups[0]["lr"] is lr


# --- kinds of parameters -------------------------------------------------------------------------

STRIDED = {
    "channels_last": lambda a: a.view(4, 5, 6, 7).contiguous(memory_format=torch.channels_last),
    "transposed": lambda a: a.view(20, 42).t(),
    "columns": lambda a: a.repeat_interleave(2).view(20, 84)[:, ::2],
    "rows": lambda a: torch.cat([a, a]).view(40, 42)[::2],
    "offset": lambda a: torch.cat([a[:3], a])[3:],
    "permuted": lambda a: a.view(4, 5, 42).permute(2, 0, 1),
    "size_one": lambda a: a.view(840, 1)[:, :1].as_strided((1, 840, 1), (7, 1, 5)),
}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("grads", ["like", "contiguous"])
def test_strided_parameter_is_updated_in_place(device, bits, layout, grads):
    p = nn.Parameter(STRIDED[layout](torch.randn(840, device=device)))
    twin = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    storage, strides = p.untyped_storage().data_ptr(), p.stride()
    outside = memory_outside(p)
    opt, other = optimizer(bits, [p], lr=1e-2), optimizer(bits, [twin], lr=1e-2)
    for _ in range(3):
        twin.grad = gradient(twin)
        p.grad = twin.grad.clone() if grads == "contiguous" else torch.empty_like(p)
        p.grad.copy_(twin.grad)
        opt.step()
        other.step()
    assert p.untyped_storage().data_ptr() == storage and p.stride() == strides
    assert torch.equal(memory_outside(p), outside)
    assert torch.equal(p, twin)
    for key in ("state1", "state2"):
        assert opt.state[p][key].shape == p.shape
        assert torch.equal(opt.state[p][key], other.state[twin][key])
    if bits == 8:
        # Blocks run over the elements in row-major order, whatever their place in memory: so
        # checkpoints do not depend on strides.
        for key in ("absmax1", "absmax2"):
            assert torch.equal(opt.state[p][key], other.state[twin][key])


def memory_outside(p):
    """The elements of p's storage that are not p's."""
    whole = torch.empty(0, dtype=p.dtype, device=p.device).set_(p.untyped_storage()).clone()
    mine = torch.zeros(whole.shape, dtype=torch.bool, device=p.device)
    mine.as_strided(p.shape, p.stride(), p.storage_offset()).fill_(True)
    return whole[~mine]


@pytest.mark.parametrize("bits", [8, 32])
def test_gradient_with_strides_of_its_own(device, bits):
    p = parameter(20, 42, device=device)
    q = copy.deepcopy(p)
    g = torch.randn(42, 20, device=device)
    p.grad, q.grad = g.t(), g.t().contiguous()
    optimizer(bits, [p], lr=1e-2).step()
    optimizer(bits, [q], lr=1e-2).step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("bits", [8, 32])
def test_op_never_takes_a_view_with_gaps_for_memory(device, bits):
    # All lists have the same strides; what lies between their elements is not theirs.
    bases = [torch.rand(300, 2, device=device) for _ in range(4)]
    p, g, m, v = (base[:, 0] for base in bases)
    before = [base[:, 1].clone() for base in bases]
    want = [x.clone() for x in (p, m, v)]
    if bits == 32:
        ops.optimizer_step_32bit(
            "adam", [want[0]], [g.clone()], [want[1]], [want[2]], *hyper_args(H, 1, device)
        )
        try:
            ops.optimizer_step_32bit("adam", [p], [g], [m], [v], *hyper_args(H, 1, device))
        except (RuntimeError, ValueError) as error:
            assert "strides" in str(error) or "contiguous" in str(error)
            return
        assert torch.equal(p, want[0]) and torch.equal(m, want[1]) and torch.equal(v, want[2])
    else:
        codes1, codes2 = (
            torch.zeros(300, 2, dtype=torch.uint8, device=device)[:, 0] for _ in range(2)
        )
        state = {
            "state1": codes1,
            "state2": codes2,
            "absmax1": torch.zeros(2, device=device),
            "absmax2": torch.zeros(2, device=device),
        }
        try:
            call8(ops, "adam", [p], [g], [state], tables(device), *hyper_args(H, 1, device))
        except (RuntimeError, ValueError) as error:
            assert "strides" in str(error) or "contiguous" in str(error)
    for base, old in zip(bases, before, strict=True):
        assert torch.equal(base[:, 1], old)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_parameter_of_few_elements(device, bits, shape):
    p, q = parameter(*shape, device=device), parameter(5, device=device)
    for params in ([p], [p, q]):
        opt = bnb.optim.Adam(params, lr=0.5, optim_bits=bits, min_8bit_size=0)
        for each in params:
            each.grad = torch.ones_like(each)
        before = p.detach().clone()
        opt.step()
        assert opt.state[p]["step"] == 1
        assert p.shape == shape and opt.state[p]["state1"].shape == shape
        assert p.numel() == 0 or (before - p).item() == pytest.approx(0.5, rel=1e-4)


# --- non-finite numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_8bit_bad_gradient_costs_one_element(step_ops, device, dtype, bad):
    n = 600
    p = torch.randn(n, device=device).to(dtype)
    g = torch.randn(n, device=device).to(dtype)
    state, clean = random_state8(n, device), None
    spots = [0, 255, 300, 599]
    clean_p, clean = p.clone(), copy.deepcopy(state)
    zeroed = g.clone()
    zeroed[spots] = 0
    g[spots] = bad
    start = p.clone()
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper_args(H, 3, device))
    call8(step_ops, "adam", [clean_p], [zeroed], [clean], tables(device), *hyper_args(H, 3, device))
    assert torch.equal(p[spots], start[spots])
    others = torch.ones(n, dtype=torch.bool, device=device)
    others[spots] = False
    assert torch.equal(p[others], clean_p[others])
    for key in ("absmax1", "absmax2"):
        assert state[key].isfinite().all()
    assert (state["state1"][spots] == 127).all() and (state["state2"][spots] == 0).all()


def test_8bit_block_of_bad_gradients_only(step_ops, device):
    p, g = torch.ones(256, device=device), torch.full((256,), NAN, device=device)
    state = random_state8(256, device)
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper_args(H, 3, device))
    assert (p == 1).all()
    assert state["absmax1"].item() == 0 and state["absmax2"].item() == 0
    assert not state["state1"].any() and not state["state2"].any()


def test_8bit_second_moment_that_overflows_stays_finite(step_ops, device):
    p, g = torch.ones(300, device=device), torch.ones(300, device=device)
    g[5] = 1e30  # its square is beyond float32
    state = {key: torch.zeros_like(value) for key, value in random_state8(300, device).items()}
    call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper_args(H, 1, device))
    assert p.isfinite().all()
    assert state["absmax2"][0].item() == torch.finfo(torch.float32).max
    assert state["state2"][5].item() == 255
    assert state["absmax1"].isfinite().all()
    # It goes on: the next step reads that state.
    call8(
        step_ops, "adam", [p], [g.clamp(max=1)], [state], tables(device), *hyper_args(H, 2, device)
    )
    assert p.isfinite().all() and state["absmax2"].isfinite().all()


def test_32bit_bad_gradient_shows_in_its_element_only(step_ops, device):
    p, g = torch.ones(300, device=device), torch.ones(300, device=device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    g[5] = NAN
    step_ops.optimizer_step_32bit("adam", [p], [g], [m], [v], *hyper_args(H, 1, device))
    for tensor in (p, m, v):
        assert tensor[5].isnan() and tensor.isnan().sum() == 1


# --- skip_zeros ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_zeros(step_ops, device, dtype):
    n = 600
    p = torch.randn(n, device=device).to(dtype)
    g = torch.randn(n, device=device).to(dtype)
    zero = torch.zeros(n, dtype=torch.bool, device=device)
    zero[::3] = True
    g[zero] = 0
    g[3] = -0.0
    m, v = torch.randn(n, device=device), torch.rand(n, device=device)
    q, x, y = p.clone(), m.clone(), v.clone()
    hyper = hyper_args(H, 3, device, skip_zeros=True)
    step_ops.optimizer_step_32bit("adam", [q], [g], [x], [y], *hyper)
    for new, old in ((q, p), (x, m), (y, v)):
        assert torch.equal(new[zero], old[zero])
    full = [t.clone() for t in (p, m, v)]
    step_ops.optimizer_step_32bit(
        "adam", [full[0]], [g], [full[1]], [full[2]], *hyper_args(H, 3, device)
    )
    for new, want in zip((q, x, y), full, strict=True):
        assert torch.equal(new[~zero], want[~zero])
        assert not torch.equal(new[zero], want[zero])

    state = random_state8(n, device)
    before = reference_state(state)
    r = p.clone()
    call8(step_ops, "adam", [r], [g], [state], tables(device), *hyper)
    assert torch.equal(r[zero], p[zero])
    want, _, (m8, v8) = before.advance(H, numpy(p), numpy(g), 3)
    m0, v0 = before.moments()
    m8, v8 = (np.where(numpy(zero), a, b) for a, b in ((m0, m8), (v0, v8)))
    m_terms = sizes(H, numpy(g), m0)
    assert_codes(state["state1"], state["absmax1"], SIGNED, m8, 2 * U * m_terms, True)
    assert_codes(state["state2"], state["absmax2"], UNSIGNED, v8, 3 * U * v8, False)
    moved = numpy(~zero)
    assert_parameter(r[~zero], want[moved], v8[moved], m_terms[moved], H, 3, dtype)


def test_skip_zeros_leaves_idle_blocks_as_they_are(step_ops, device):
    p, g = torch.ones(1000, device=device), torch.zeros(1000, device=device)
    g[300] = 1.0  # only block 1 has anything to do
    state = random_state8(1000, device)
    before = copy.deepcopy(state)
    for step in range(1, 4):
        hyper = hyper_args(H, step, device, skip_zeros=True)
        call8(step_ops, "adam", [p], [g], [state], tables(device), *hyper)
    idle = torch.ones(1000, dtype=torch.bool, device=device)
    idle[256:512] = False
    for key in ("state1", "state2"):
        assert torch.equal(state[key][idle], before[key][idle])
        assert torch.equal(
            state[key.replace("state", "absmax")][[0, 2, 3]],
            before[key.replace("state", "absmax")][[0, 2, 3]],
        )
    assert (p != 1).sum() == 1


@pytest.mark.parametrize("bits", [8, 32])
def test_skip_zeros_through_args(device, bits):
    args = bnb.optim.optimizer.MockArgs(
        {"optim_bits": bits, "min_8bit_size": 1, "max_unorm": 0.0, "skip_zeros": True}
    )
    p = nn.Parameter(torch.ones(600, device=device))
    opt = bnb.optim.AdamW([p], lr=0.1, args=args)
    p.grad = torch.zeros_like(p)
    p.grad[::2] = 1
    opt.step()
    assert (p[1::2] == 1).all() and (p[::2] < 1).all()
    assert (opt.state[p]["state1"].dtype == torch.uint8) == (bits == 8)


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_graph_replay_equals_eager(device, bits):
    if device != "cuda":
        pytest.skip("CUDA graphs exist on CUDA only")
    params = [parameter(*shape, device=device) for shape in ((700,), (64, 65), (3,))]
    twins = copy.deepcopy(params)
    lr = torch.tensor(1e-2, device=device)
    opt = optimizer(bits, params, lr=lr, weight_decay=0.1)
    eager = optimizer(bits, twins, lr=torch.tensor(1e-2, device=device), weight_decay=0.1)
    for p in params:
        p.grad = torch.zeros_like(p)

    def gradients():
        for p, q in zip(params, twins, strict=True):
            p.grad.copy_(gradient(p))
            q.grad = p.grad.clone()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # states and buckets exist before the capture
            gradients()
            opt.step()
            eager.step()
    torch.cuda.current_stream().wait_stream(stream)
    gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for i in range(5):
        if i:
            gradients()
        if i == 3:  # the graph reads the learning rate where it is
            lr.fill_(1e-3)
            eager.param_groups[0]["lr"].fill_(1e-3)
        graph.replay()
        eager.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        for key, value in eager.state[q].items():
            got = opt.state[p][key]
            assert torch.equal(got, value) if torch.is_tensor(value) else got == value
    assert opt.state[params[0]]["step"] == 7


def test_capture_before_any_step_is_refused(device):
    if device != "cuda":
        pytest.skip("CUDA graphs exist on CUDA only")
    p = parameter(700, device=device)
    p.grad = torch.zeros_like(p)
    opt = optimizer(8, [p])
    with pytest.raises(RuntimeError, match="take one step eagerly first"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            opt.step()


def test_cuda_states_equal_cpu_states(device):
    if device == "cpu":
        pytest.skip("compares another device with the CPU")
    for bits in (8, 32):
        p = parameter(5000)
        q = nn.Parameter(p.detach().to(device))
        opt, there = optimizer(bits, [p], lr=1e-2), optimizer(bits, [q], lr=1e-2)
        for _ in range(20):
            p.grad = gradient(p)
            q.grad = p.grad.to(device)
            opt.step()
            there.step()
        for key, value in opt.state[p].items():
            if torch.is_tensor(value):
                assert torch.equal(there.state[q][key].cpu(), value), key


# --- errors --------------------------------------------------------------------------------------


def arguments(bits, device):
    """Good arguments of a list op by name; the tests spoil them."""
    n = 300
    good = {
        "rule": "adam",
        "params": [torch.ones(n, device=device), torch.ones(40, device=device)],
        "grads": [torch.ones(n, device=device), torch.ones(40, device=device)],
    }
    if bits == 32:
        good |= {key: [torch.zeros_like(p) for p in good["params"]] for key in ("state1", "state2")}
    else:
        states = [random_state8(p.numel(), device) for p in good["params"]]
        good |= {key: [s[key] for s in states] for key in states[0]}
        good["qmap1"], good["qmap2"] = tables(device)
    hyper = hyper_args(H, 1, device)
    good["step"], good["lr_tensor"] = hyper[0], hyper[1]
    good["rest"] = hyper[2:]
    return good


def swap(name, i, change):
    """Replaces element i of a list."""

    def apply(arguments):
        arguments[name][i] = change(arguments[name][i])

    return apply


def replace(name, change):
    def apply(arguments):
        arguments[name] = change(arguments[name])

    return apply


BOTH = {
    "rule": replace("rule", lambda _: "adan"),
    "grads: one missing": replace("grads", lambda x: x[:1]),
    "state1: one missing": replace("state1", lambda x: x[:1]),
    "state2: missing": replace("state2", lambda _: []),
    "grads: size": swap("grads", 1, lambda x: x[:39]),
    "grads: dtype": swap("grads", 1, lambda x: x.half()),
    "params: dtype": swap("params", 1, lambda x: x.half()),
    "params: expanded": swap("params", 1, lambda x: x[:1].expand(x.shape)),
    "params: float64": lambda a: a.update(
        params=[x.double() for x in a["params"]], grads=[x.double() for x in a["grads"]]
    ),
    "state1: size": swap("state1", 1, lambda x: x[1:]),
    "state2: dtype": swap("state2", 1, lambda x: x.double()),
    "step: dtype": replace("step", lambda x: x.float()),
    "step: size": replace("step", lambda x: x.repeat(2)),
    "lr_tensor: size": replace("lr_tensor", lambda _: torch.ones(2)),
    "lr_tensor: dtype": replace("lr_tensor", lambda _: torch.ones((), dtype=torch.float16)),
}
EIGHT = {
    "absmax1: size": swap("absmax1", 0, lambda x: x[:1]),
    "absmax2: dtype": swap("absmax2", 0, lambda x: x.double()),
    "absmax1: one missing": replace("absmax1", lambda x: x[:1]),
    "qmap1: size": replace("qmap1", lambda x: x[:255]),
    "qmap1: dtype": replace("qmap1", lambda x: x.double()),
    "qmap2: missing": replace("qmap2", lambda _: None),
}
CASES = [(bits, what) for bits in (8, 32) for what in BOTH] + [(8, what) for what in EIGHT]


@pytest.mark.parametrize(("bits", "what"), CASES)
def test_bad_input_gets_a_sentence_and_changes_nothing(step_ops, device, bits, what):
    bad = arguments(bits, device)
    lists = [bad[key] for key in ("params", "state1", "state2", "absmax1", "absmax2") if key in bad]
    tensors = [tensor for tensors in lists for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    (BOTH | EIGHT)[what](bad)
    if bad["lr_tensor"] is not None:
        bad["lr_tensor"] = bad["lr_tensor"].to(device)
    op = "optimizer_step_8bit_blockwise" if bits == 8 else "optimizer_step_32bit"
    argument = what.split(":")[0]
    # Native kernels raise RuntimeError, the plain ones ValueError; what an optimizer keeps per
    # parameter may be named by the parameter.
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"^{op}: .*(\b{argument}\b|params\[[01]\])"
    ):
        values = list(bad.values())
        getattr(step_ops, op)(*values[:-1], *values[-1])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


def test_bad_devices_get_a_sentence(step_ops, device):
    if device == "cpu":
        pytest.skip("needs two devices")
    for key in ("grads", "state1", "state2", "absmax1"):
        bad = arguments(8, device)
        bad[key][1] = bad[key][1].cpu()
        values = list(bad.values())
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            step_ops.optimizer_step_8bit_blockwise(*values[:-1], *values[-1])


def test_empty_list_gets_a_sentence(step_ops):
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="params"):
        step_ops.optimizer_step_32bit("adam", [], [], [], [], *hyper_args(H, 1, "cpu"))


def test_good_arguments_of_the_error_tests_are_good(step_ops, device):
    for bits in (8, 32):
        good = arguments(bits, device)
        values = list(good.values())
        name = "optimizer_step_8bit_blockwise" if bits == 8 else "optimizer_step_32bit"
        getattr(step_ops, name)(*values[:-1], *values[-1])
        assert all((p != 1).all() for p in good["params"])


def test_float64_parameter_is_named():
    p = nn.Parameter(torch.ones(5, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.raises((ValueError, RuntimeError), match=r"params must be .*float32"):
        bnb.optim.Adam([p]).step()
    assert (p == 1).all()


def test_amsgrad_is_not_silently_ignored():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bnb.optim.Adam([parameter(3)], amsgrad=True)
    assert any("amsgrad" in str(w.message) for w in caught)
