# SPDX-License-Identifier: MIT
"""Optimizers in plain PyTorch: PytorchLARS, AnalysisAdam and the plain form of AdEMAMix."""

import copy
import math

import pytest
import torch
from optim_helpers import parameter, step

import bitsandbytes.functional as F
from bitsandbytes.optim import PytorchLARS
from bitsandbytes.optim.adam import AnalysisAdam
from bitsandbytes.optim.ademamix import _ReferenceAdEMAMix

# --- PytorchLARS ---------------------------------------------------------------------------------


def lars(p, grads, lr, momentum, dampening, weight_decay, nesterov, max_unorm):
    """The rule for one tensor in float64, from its description."""
    p, buffer = p.double(), None
    for g in grads:
        d = g.double() + weight_decay * p
        if momentum:
            buffer = d if buffer is None else momentum * buffer + (1 - dampening) * d
            d = d + momentum * buffer if nesterov else buffer
        scale = 1.0
        if max_unorm and d.norm() > max_unorm * p.norm():
            scale = max_unorm * p.norm() / d.norm()
        p = p - lr * scale * d
    return p


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("extra", [{}, {"dampening": 0.5}, {"nesterov": True}])
@pytest.mark.parametrize("max_unorm", [0.0, 0.02, 100.0])
def test_lars_follows_its_description(device, momentum, extra, max_unorm):
    if extra.get("nesterov") and not momentum:
        pytest.skip("refused")
    settings = {
        **{"lr": 0.1, "momentum": momentum, "dampening": 0, "weight_decay": 0.01},
        **{"nesterov": False, "max_unorm": max_unorm},
        **extra,
    }
    p = parameter(40, 30, device=device)
    grads = [torch.randn_like(p) for _ in range(5)]
    want = lars(p.detach(), grads, **settings)
    opt = PytorchLARS([p], **settings)
    for g in grads:
        p.grad = g
        opt.step()
    torch.testing.assert_close(p.double(), want, rtol=1e-5, atol=1e-6)
    assert set(opt.state[p]) == ({"momentum_buffer"} if momentum else set())


def test_lars_takes_sixty_four_bits(device):
    p = torch.nn.Parameter(torch.randn(50, dtype=torch.float64, device=device))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_unorm": 0.02}
    p.grad = torch.randn_like(p)
    want = lars(p.detach(), [p.grad], **settings, dampening=0, nesterov=False)
    PytorchLARS([p], **settings).step()
    torch.testing.assert_close(p.detach(), want, rtol=1e-14, atol=0)


def test_lars_names_sparse_gradients_before_it_steps(device):
    first, second = parameter(4, device=device), parameter(4, 4, device=device)
    first.grad, second.grad = torch.ones_like(first), torch.eye(4, device=device).to_sparse()
    before = first.detach().clone()
    with pytest.raises(RuntimeError, match=r"^PytorchLARS.step: gradients must be dense"):
        PytorchLARS([first, second]).step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_lars_takes_sixteen_bits(dtype, momentum):
    p = parameter(50, dtype=dtype)
    before = p.detach().clone()
    opt = PytorchLARS([p], momentum=momentum, lr=1.0, max_unorm=0.25)
    step(opt, p)
    moved = (p - before).float().norm()
    assert moved.item() == pytest.approx(0.25 * before.float().norm().item(), rel=0.02)


def test_lars_of_a_parameter_of_zeros_moves():
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    PytorchLARS([p], lr=0.5).step()
    assert (p == -0.5).all()


def test_lars_refuses():
    for kwargs in (
        {"lr": -1.0},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    ):
        with pytest.raises(ValueError, match="PytorchLARS"):
            PytorchLARS([parameter(3)], **kwargs)


def test_lars_of_an_old_pickle_has_no_nesterov():
    opt = PytorchLARS([parameter(3)], momentum=0.9)
    state = opt.__getstate__()
    del state["param_groups"][0]["nesterov"]
    opt.__setstate__(state)
    assert opt.param_groups[0]["nesterov"] is False


# --- AdEMAMix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedules", [{}, {"t_alpha": 4, "t_beta3": 6}])
def test_ademamix_follows_its_description(schedules):
    p = parameter(40, 30)
    q, m1, m2, nu = p.detach().double(), 0.0, 0.0, 0.0
    lr, (b1, b2, b3), alpha, wd = 1e-2, (0.9, 0.99, 0.999), 3.0, 0.1
    opt = _ReferenceAdEMAMix([p], lr, (b1, b2, b3), alpha, 1e-8, wd, **schedules)
    for t in range(1, 9):
        p.grad = torch.randn_like(p)
        g = p.grad.double()
        a = alpha * min(1.0, t / schedules["t_alpha"]) if schedules else alpha
        beta3 = b3
        if schedules and t < schedules["t_beta3"]:
            s = t / schedules["t_beta3"]
            # Linear in the half-life: 1 / ln(beta) between those of beta1 and beta3.
            beta3 = math.exp(1 / ((1 - s) / math.log(b1) + s / math.log(b3)))
        m1, m2 = b1 * m1 + (1 - b1) * g, beta3 * m2 + (1 - beta3) * g
        nu = b2 * nu + (1 - b2) * g * g
        update = (m1 / (1 - b1**t) + a * m2) / ((nu / (1 - b2**t)).sqrt() + 1e-8)
        q = q - lr * (update + wd * q)
        opt.step()
    torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)
    state = opt.state[p]
    assert state["m1_m2"].shape == (2, 40, 30) and state["nu"].shape == (40, 30)
    assert opt.param_groups[0]["step"] == 8


# --- AnalysisAdam --------------------------------------------------------------------------------

ROUTINES = ["dynamic-blockwise", "dynamic", "linear", "quantile"]


@pytest.mark.parametrize("routine", ROUTINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_analysis_applies_the_32_bit_update(device, routine, dtype):
    p = parameter(100, 100, dtype=dtype, device=device)
    q, m, v = p.detach().double(), 0.0, 0.0
    opt = AnalysisAdam([p], lr=1e-2, weight_decay=0.1, bnb_analysis=routine)
    for t in range(1, 4):
        p.grad = torch.randn_like(p)
        g = p.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        c1, c2 = 1 - 0.9**t, math.sqrt(1 - 0.999**t)
        q = q - 1e-2 * 0.1 * q - 1e-2 * c2 / c1 * m / (v.sqrt() + 1e-8)
        opt.step()
    # In bfloat16 one rounding per step, of numbers a step away from the last one.
    exact = {"rtol": 1e-5, "atol": 1e-6}
    rounded = {"rtol": 3 * 2.0**-8, "atol": 3 * 0.03 * 2.0**-8}
    torch.testing.assert_close(p.double(), q, **(exact if dtype == torch.float32 else rounded))
    state = opt.state[p]
    assert state["step"] == 3 and state["exp_avg"].dtype == torch.float32
    for key in ("abserrors", "relerrors", "counts"):
        assert state[key].shape == (256, 256) and state[key].dtype == torch.float32
    assert state["counts"].sum() == 3 * p.numel()
    for key in ("abserrors", "relerrors"):
        assert state[key].isfinite().all() and 0 < state[key].sum()
        assert not state[key][state["counts"] == 0].any()


def test_analysis_ranks_the_routines():
    errors = {}
    for routine in ROUTINES:
        torch.manual_seed(0)
        p = parameter(100, 100)
        opt = AnalysisAdam([p], bnb_analysis=routine)
        for _ in range(3):
            p.grad = torch.randn(100, 100) * torch.logspace(-3, 0, 100)[:, None]
            opt.step()
        errors[routine] = opt.state[p]["abserrors"].sum().item()
    assert errors["dynamic-blockwise"] < errors["dynamic"] < errors["linear"]


def test_analysis_counts_by_the_codes_of_both_moments():
    p = parameter(128, 128)
    opt = AnalysisAdam([p])
    step(opt, p)
    codes = [
        F.quantize_blockwise(opt.state[p][key], code=F.create_dynamic_map(signed), blocksize=256)[0]
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
    ]
    want = torch.zeros(256, 256)
    for a, b in zip(*(c.reshape(-1).tolist() for c in codes), strict=True):
        want[a, b] += 1
    assert torch.equal(opt.state[p]["counts"], want)


@pytest.mark.parametrize(("numel", "counted"), [(8192, False), (8193, True)])
def test_analysis_of_small_parameters(numel, counted):
    p = parameter(numel)
    opt = AnalysisAdam([p])
    step(opt, p)
    assert opt.state[p]["counts"].any() == counted


def test_analysis_saves_every_hundred_steps(tmp_path):
    p, q = parameter(3), parameter(91, 91)
    opt = AnalysisAdam([p, q], savedir=str(tmp_path))
    for i in range(101):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        opt.step()
        if i == 98:
            assert not list(tmp_path.iterdir())
    kinds = ("abserr", "relerr", "counts")
    names = {f"0_3_{k}.pkl" for k in kinds} | {f"1_91_91_{k}.pkl" for k in kinds}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert torch.load(tmp_path / "1_91_91_counts.pkl").sum() == 100 * q.numel()


def test_analysis_with_a_routine_of_ones_own():
    class Own(AnalysisAdam):
        def quantize(self, x, signed):
            return torch.full_like(x, 7, dtype=torch.uint8), x

    p = parameter(100, 100)
    opt = Own([p], bnb_analysis="my-quantization-routine")
    step(opt, p)
    assert opt.state[p]["counts"][7, 7] == p.numel()
    assert not opt.state[p]["abserrors"].any()
    plain = AnalysisAdam([copy.deepcopy(p)], bnb_analysis="my-quantization-routine")
    with pytest.raises(NotImplementedError, match="quantize"):
        step(plain, *plain.param_groups[0]["params"])


def test_analysis_refuses():
    with pytest.raises(ValueError, match="bnb_analysis"):
        AnalysisAdam([parameter(3)], bnb_analysis="static")
    p = parameter(10, 4)
    with pytest.raises(AssertionError, match="amsgrad"):
        step(AnalysisAdam([p], amsgrad=True), p)
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (10, 4), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        AnalysisAdam([p]).step()


def test_analysis_announces_what_fairseq_asks():
    opt = AnalysisAdam([parameter(3)])
    assert opt.supports_memory_efficient_fp16 is True and opt.supports_flat_params is True
