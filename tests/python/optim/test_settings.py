# SPDX-License-Identifier: MIT
"""Settings of every optimizer: scales of states, bounds, schedules, rounding, rates on a device."""

import copy
import math

import pytest
import torch
from optim_helpers import assert_continues_alike, assert_same_state, parameter
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.optim import GlobalOptimManager, buckets
from bitsandbytes.optim.ademamix import _ReferenceAdEMAMix

U = 2.0**-24
# Class -> what it cannot be made without.
CLASSES = {
    "Adam": {},
    "AdEMAMix": {},
    "LAMB": {},
    "Lion": {},
    "SGD": {"lr": 1e-2, "momentum": 0.9},
    "LARS": {"lr": 1e-2, "momentum": 0.9},
    "RMSprop": {},
    "Adagrad": {},
}
TENSOR_WISE = [name for name in CLASSES if name != "AdEMAMix"]
SHAPES = ((70, 80), (5,), (4096,))


def make(name, params, bits, **kwargs):
    return getattr(bnb.optim, name)(params, optim_bits=bits, **{**CLASSES[name], **kwargs})


def set_gradients(params, scale=1.0):
    for p in params:
        p.grad = (torch.randn(p.shape) * scale).to(p.dtype).to(p.device)


def follow(params, twins):
    for p, twin in zip(params, twins, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()


@pytest.fixture
def manager():
    instance = GlobalOptimManager.get_instance()
    kept = list(instance.module_weight_config_triple)
    instance.initialize()
    yield instance
    instance.initialize()
    instance.module_weight_config_triple.extend(kept)


# --- one scale per tensor ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TENSOR_WISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_wise_states(device, name, dtype):
    params = [parameter(*shape, dtype=dtype, device=device) for shape in SHAPES]
    twins = copy.deepcopy(params)
    opt, exact = make(name, params, 8, block_wise=False), make(name, twins, 32)
    set_gradients(params)
    follow(params, twins)
    opt.step()
    exact.step()
    for p, twin in zip(params, twins, strict=True):
        # The states were zero, which codes hold exactly: the first step is that of 32 bits.
        torch.testing.assert_close(p, twin, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)
        state, want = opt.state[p], exact.state[twin]
        assert (state["state1"].dtype == torch.uint8) == (p.numel() >= 4096)
        if p.numel() < 4096:
            continue
        for i in (1, 2) if "state2" in want else (1,):
            for key in (f"max{i}", f"new_max{i}"):
                assert state[key].shape == (1,) and state[key].dtype == torch.float32
                largest = want[f"state{i}"].abs().max()
                torch.testing.assert_close(state[key][0], largest, rtol=8 * U, atol=0)
            assert f"absmax{i}" not in state
            numbers = state[f"qmap{i}"][state[f"state{i}"].long()] * state[f"max{i}"]
            # Half a step of the coarsest decade; -1 is no level, which costs up to 0.71 %.
            bound = largest * 0.9 / 64 * 0.5 * 1.001
            assert ((numbers - want[f"state{i}"]).abs() <= bound).all()
            assert numbers.abs().max() > 0.99 * largest


SETTINGS = {
    "tensor-wise": {"block_wise": False},
    "percentile clipping": {"percentile_clipping": 30},
    "both": {"block_wise": False, "percentile_clipping": 30},
    "bound": {},
}


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["Adam", "LARS"])
def test_list_is_its_parameters_one_by_one(device, name, bits, what):
    # Numbers that are one per parameter move with it when gradients come and go.
    pattern = [(1, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)]
    params = [parameter(*shape, device=device) for shape in SHAPES]
    alone = copy.deepcopy(params)

    def own(members):
        opt = make(name, members, bits, **SETTINGS[what])
        opt.args.max_unorm = 0.5 if what == "bound" else 0.0
        return opt

    opt, opts = own(params), [own([q]) for q in alone]
    for i, present in enumerate(pattern):
        for here, p, q, single in zip(present, params, alone, opts, strict=True):
            p.grad = torch.randn_like(p) * (1 + i) if here else None
            q.grad = None if p.grad is None else p.grad.clone()
            if here:
                single.step()
        opt.step()
    for p, q, single in zip(params, alone, opts, strict=True):
        assert torch.equal(p, q)
        assert_same_state(opt.state[p], single.state[q])


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize("name", ["Adam", "LARS"])
def test_settings_survive_a_checkpoint(what, name):
    params = [parameter(*shape) for shape in SHAPES]
    opt = make(name, params, 8, **SETTINGS[what])
    for _ in range(3):
        set_gradients(params)
        opt.step()
    others = copy.deepcopy(params)
    other = make(name, others, 8, **SETTINGS[what])
    other.load_state_dict(opt.state_dict())
    assert_continues_alike(opt, params, other, others)


STATES = [("AdEMAMix", {}), ("LAMB", {}), ("LARS", {}), ("Adam", {"block_wise": False})]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("name", "kwargs"), STATES)
def test_parameter_with_strides_of_its_own(device, name, kwargs, bits):
    p = nn.Parameter(torch.randn(8, 16, 6, 6, device=device).to(memory_format=torch.channels_last))
    twin = nn.Parameter(p.detach().contiguous())
    opt, other = make(name, [p], bits, **kwargs), make(name, [twin], bits, **kwargs)
    address, strides = p.data_ptr(), p.stride()
    for _ in range(3):
        p.grad = torch.randn_like(p)
        twin.grad = p.grad.contiguous()
        opt.step()
        other.step()
    assert (p.data_ptr(), p.stride()) == (address, strides)
    assert torch.equal(p, twin)
    assert_same_state(opt.state[p], other.state[twin])


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
@pytest.mark.parametrize(("name", "kwargs"), STATES)
def test_parameter_of_few_elements(device, name, kwargs, shape):
    p, q = parameter(*shape, device=device), parameter(70, 80, device=device)
    before = p.detach().clone()
    opt = make(name, [p, q], 8, min_8bit_size=0, **kwargs)
    for _ in range(2):
        set_gradients([p, q])
        opt.step()
    assert p.shape == shape and (p.numel() == 0 or not torch.equal(p, before))
    rows = (2,) if name == "AdEMAMix" else ()
    assert opt.state[p]["state1"].shape == (*rows, *shape)
    assert opt.state[p]["state1"].dtype == torch.uint8
    other = make(name, [p, q], 8, min_8bit_size=0, **kwargs)
    other.load_state_dict(opt.state_dict())


# --- percentile clipping -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ["Adam", "Lion", "SGD", "AdEMAMix"])
def test_percentile_clipping_is_a_factor_on_each_gradient(device, name, bits):
    params = [parameter(*shape, device=device) for shape in SHAPES]
    twins = copy.deepcopy(params)
    opt = make(name, params, bits, percentile_clipping=5)
    manual = make(name, twins, bits)
    histories = [[] for _ in params]
    clipped = 0
    for i in range(12):
        set_gradients(params, 1.0 + math.sin(i))
        for p, twin, squares in zip(params, twins, histories, strict=True):
            square = p.grad.double().square().sum().item()
            squares[:] = [square] * 100 if i == 0 else squares
            squares[(i + 1) % 100] = square
            clip, norm = math.sqrt(sorted(squares)[5]), math.sqrt(square)
            clipped += norm > clip
            twin.grad = p.grad * (clip / norm if norm > clip else 1.0)
        opt.step()
        manual.step()
    assert clipped > 10
    for p, twin, squares in zip(params, twins, histories, strict=True):
        # The two gradients differ by roundings, which 8-bit states turn into a code at most.
        close = torch.isclose(p, twin, rtol=1e-4, atol=1e-5 if bits == 32 else 1e-4)
        assert close.float().mean() > (0.999 if bits == 32 else 0.99)
        history = opt.state[p]["gnorm_vec"]
        assert history.shape == (100,) and history.dtype == torch.float32
        torch.testing.assert_close(history.cpu(), torch.tensor(squares), rtol=1e-5, atol=0)


def test_percentile_clipping_that_starts_late_clips_nothing_at_first():
    p = parameter(50)
    twin = copy.deepcopy(p)
    opt, plain = make("SGD", [p], 32), make("SGD", [twin], 32)
    for i in range(4):
        set_gradients([p], 10.0**i)
        follow([p], [twin])
        if i == 2:
            opt.args.percentile_clipping = 5
        opt.step()
        plain.step()
    assert torch.equal(p, twin)
    assert torch.isfinite(opt.state[p]["gnorm_vec"]).sum() == 2


# --- max_unorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["32", "8", "tensor-wise"])
@pytest.mark.parametrize("name", CLASSES)
def test_update_is_bounded(device, name, state):
    if name == "AdEMAMix" and state == "tensor-wise":
        pytest.skip("AdEMAMix has blockwise states only")
    bits = 32 if state == "32" else 8
    lr, bound = 1e-2, 0.01
    params = [parameter(*shape, device=device) for shape in SHAPES]
    with torch.no_grad():
        params[2].mul_(1e4)  # too large for the bound to matter
    twins = copy.deepcopy(params)
    kwargs = {**CLASSES[name], "lr": lr, "block_wise": state != "tensor-wise"}
    opt, free = make(name, params, bits, **kwargs), make(name, twins, bits, **kwargs)
    for each, value in ((opt, bound), (free, 0.0)):
        each.args.max_unorm = value
        each.param_groups[0]["weight_decay"] = 0.0
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        set_gradients(params)
        follow(params, twins)
        opt.step()
        free.step()
        for p, twin, old in zip(params[:2], twins, before, strict=False):
            moved = (p - old).norm() / lr
            torch.testing.assert_close(moved, bound * old.norm(), rtol=1e-3, atol=0)
            # Only the length differs: on the first step both start from the same place.
            if torch.equal(twin.grad, p.grad) and _ == 0:
                cosine = torch.cosine_similarity((p - old).view(1, -1), (twin - old).view(1, -1))
                assert cosine.item() > 0.9999
            assert opt.state[p]["unorm_vec"].item() > (bound * old.norm().item()) ** 2
        assert torch.equal(params[2], twins[2])


def test_bound_measures_the_update_as_a_sum_of_squares(device):
    p = nn.Parameter(torch.full((5000,), 2.0, device=device))
    opt = bnb.optim.LAMB([p], lr=0.5)
    p.grad = torch.ones_like(p)
    opt.step()
    # Adam's first update is one in every element: no longer than the parameter.
    assert opt.state[p]["unorm_vec"].item() == pytest.approx(5000, rel=1e-4)
    torch.testing.assert_close(p, torch.full_like(p, 1.5))


def test_parameter_of_zeros_is_not_bounded(device):
    p = nn.Parameter(torch.zeros(5000, device=device))
    opt = bnb.optim.LARS8bit([p], lr=0.5, momentum=0.9)
    p.grad = torch.ones_like(p)
    opt.step()
    assert (p == -0.5).all()


@pytest.mark.parametrize("name", ["LAMB", "LARS"])
@pytest.mark.parametrize("bits", [8, 32])
def test_without_bound_lamb_is_adam_and_lars_is_momentum(name, bits):
    base = {"LAMB": "Adam", "LARS": "SGD"}[name]
    params = [parameter(5000)]
    twins = copy.deepcopy(params)
    opt, other = make(name, params, bits, max_unorm=0.0), make(base, twins, bits)
    for _ in range(3):
        set_gradients(params)
        follow(params, twins)
        opt.step()
        other.step()
    assert torch.equal(params[0], twins[0])


def test_lars_equals_its_plain_form(device):
    params = [parameter(*shape, device=device) for shape in SHAPES]
    twins = copy.deepcopy(params)
    kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_unorm": 0.1}
    opt, plain = bnb.optim.LARS(params, **kwargs), bnb.optim.PytorchLARS(twins, **kwargs)
    for _ in range(10):
        set_gradients(params)
        follow(params, twins)
        opt.step()
        plain.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)


# --- AdEMAMix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{}, {"t_alpha": 7, "t_beta3": 12}, {"t_alpha": 0}])
@pytest.mark.parametrize("cls", ["AdEMAMix", "AdEMAMix32bit", "AdEMAMix8bit"])
def test_ademamix_follows_the_plain_form(device, cls, schedule):
    shapes = ((70, 80), (4096 + 255,), (300,))  # blocks that end anywhere
    params = [parameter(*shape, device=device) for shape in shapes]
    twins = copy.deepcopy(params)
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.99, 0.999), "weight_decay": 0.0, **schedule}
    opt = getattr(bnb.optim, cls)(params, **kwargs)
    plain = _ReferenceAdEMAMix(twins, **kwargs)
    for _ in range(15):
        set_gradients(params)
        follow(params, twins)
        opt.step()
        plain.step()
    for p, twin in zip(params, twins, strict=True):
        state, want = opt.state[p], plain.state[twin]
        assert state["state1"].shape == (2, *p.shape)
        if state["state1"].dtype == torch.float32:
            torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state["state1"], want["m1_m2"], rtol=1e-5, atol=1e-6)
            continue
        assert (p - twin).abs().mean() < 1e-3 and (p - twin).abs().max() < 0.02
        for row in (0, 1):  # each in blocks of its own
            blocks = state["absmax1"][row].repeat_interleave(256)[: p.numel()]
            numbers = state["qmap1"][state["state1"][row].reshape(-1).long()] * blocks
            wanted = want["m1_m2"][row].reshape(-1)
            assert (numbers - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def test_settings_of_a_schedule_may_change_in_its_group():
    p = parameter(50)
    twin = copy.deepcopy(p)
    opt, other = make("AdEMAMix", [p], 32), make("AdEMAMix", [twin], 32, t_alpha=5, alpha=2.0)
    opt.param_groups[0].update(t_alpha=5, alpha=2.0)
    for _ in range(3):
        set_gradients([p])
        follow([p], [twin])
        opt.step()
        other.step()
    assert torch.equal(p, twin)


# --- learning rate on the device -----------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("bits", [8, 32])
def test_learning_rate_on_the_device(device, name, bits):
    params = [parameter(*shape, device=device) for shape in SHAPES]
    twins = copy.deepcopy(params)
    lr = torch.tensor(2.0**-7, device=device)
    opt = make(name, params, bits, lr=lr)
    plain = make(name, twins, bits, lr=2.0**-7)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (opt, plain)]
    for _ in range(3):
        set_gradients(params)
        follow(params, twins)
        for each in (opt, plain, *schedules):
            each.step()
    assert opt.param_groups[0]["lr"] is lr and lr.item() == 2.0**-10
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=4 * U, atol=1e-7)


@pytest.mark.parametrize("bits", [8, 32])
def test_double_learning_rate_on_the_device_counts_like_a_number(device, bits):
    lr = 0.1  # neither a float32 nor halfway between two
    params = [parameter(*shape, device=device) for shape in SHAPES]
    twins = copy.deepcopy(params)
    opt = make("Adam", params, bits, lr=torch.tensor(lr, dtype=torch.float64, device=device))
    plain = make("Adam", twins, bits, lr=lr)
    for _ in range(3):
        set_gradients(params)
        follow(params, twins)
        opt.step()
        plain.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)


def test_loaded_learning_rate_stays_a_tensor():
    p = parameter(50)
    opt = bnb.optim.Adam([p], lr=torch.tensor(0.25))
    other = bnb.optim.Adam([parameter(50)], lr=0.125)
    opt.load_state_dict(other.state_dict())
    lr = opt.param_groups[0]["lr"]
    assert torch.is_tensor(lr) and lr.item() == 0.125


# --- stochastic rounding -------------------------------------------------------------------------


def rounded(device, seed, n=4096, bits=8, dtype=torch.bfloat16, steps=1, count=1, lr=0.3 * 2.0**-8):
    """Parameters of ones after steps of a third of the spacing of bfloat16 below one."""
    params = [nn.Parameter(torch.ones(n, dtype=dtype, device=device)) for _ in range(count)]
    options = {} if seed is None else {"stochastic_rounding": True, "rounding_seed": seed}
    opt = bnb.optim.SGD(params, lr=lr, momentum=0.5, optim_bits=bits, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    return opt, params


@pytest.mark.parametrize("bits", [8, 32])
def test_stochastic_rounding_has_no_bias(device, bits):
    n = 100_000
    _, (p,) = rounded(device, 0, n, bits)
    values = p.detach().float()
    assert set(values.unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    share = (values < 1).double().mean().item()
    # Five standard deviations of a binomial distribution; the parts below 2^-16 of a spacing
    # are lost.
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n) + 2.0**-15
    _, (nearest,) = rounded(device, None, n, bits)
    assert (nearest == 1).all()


def test_stochastic_rounding_is_reproducible_by_seed(device):
    bits = [rounded(device, seed, steps=3)[1][0].detach() for seed in (7, 7, 8)]
    assert torch.equal(bits[0], bits[1])
    assert 0.2 < (bits[0] != bits[2]).float().mean() < 0.9


def test_stochastic_rounding_differs_between_tensors_steps_and_groups(device):
    _, (p, q) = rounded(device, 0, count=2)
    assert 0.3 < (p != q).float().mean() < 0.6  # 2 * 0.3 * 0.7
    params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device)) for _ in "12"]
    opt = bnb.optim.SGD(
        [{"params": [p]} for p in params], lr=0.3 * 2.0**-8, momentum=0.5, stochastic_rounding=True
    )
    drawn = []
    for _ in range(2):
        for each in params:
            each.data.fill_(1.0)
            each.grad = torch.full_like(each, 1.0 if not drawn else 0.5)
        opt.step()
        drawn.append([(each < 1).detach() for each in params])
    for a, b in ((drawn[0][0], drawn[0][1]), (drawn[0][0], drawn[1][0])):
        assert 0.3 < (a != b).float().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_round_to_nearest(dtype):
    _, (p,) = rounded("cpu", 0, dtype=dtype)
    _, (q,) = rounded("cpu", None, dtype=dtype)
    assert torch.equal(p, q)


def test_stochastic_rounding_survives_a_checkpoint():
    opt, params = rounded("cpu", 5, steps=2, count=2)
    others = copy.deepcopy(params)
    for options in ({"stochastic_rounding": True, "rounding_seed": 9}, {}):
        # The seed is part of the groups: the checkpoint's counts.
        other = bnb.optim.SGD(others, lr=1.0, momentum=0.5, optim_bits=8, **options)
        other.load_state_dict(opt.state_dict())
        assert other.param_groups[0]["rounding_seed"] == 5
    assert_continues_alike(opt, params, other, others)


def test_small_updates_are_lost_by_nearest_and_kept_by_stochastic_rounding():
    _, (nearest,) = rounded("cpu", None, steps=20, lr=2.0**-12)
    _, (stochastic,) = rounded("cpu", 0, steps=20, lr=2.0**-12)
    assert (nearest == 1).all()
    # Steps of lr (2 - 2^-k): the momentum of ones at 0.5.
    moved = sum(2 - 2.0**-k for k in range(20)) * 2.0**-12
    assert stochastic.double().mean().item() == pytest.approx(1 - moved, abs=2e-4)


# --- overrides of single parameters --------------------------------------------------------------

OVERRIDES = [
    ("Adam", "betas", (0.5, 0.6)),
    ("Adam", "eps", 3.0),
    ("Adam", "weight_decay", 0.7),
    ("Adam", "lr", 0.3),
    ("AdEMAMix", "alpha", 1.0),
    ("AdEMAMix", "t_alpha", 5),
    ("AdEMAMix", "t_beta3", 5),
    ("Adam", "max_unorm", 0.01),
    ("AdEMAMix", "max_unorm", 0.01),
    ("LAMB", "max_unorm", 0.0),
    ("Adam", "skip_zeros", True),
    ("Adam", "percentile_clipping", 5),
    ("Adam", "block_wise", False),
    ("Lion", "optim_bits", 32),
    ("SGD", "min_8bit_size", 10_000),
]
AT_CREATION = {"block_wise", "optim_bits", "min_8bit_size"}


@pytest.mark.parametrize(("name", "key", "value"), OVERRIDES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_override_equals_the_optimizers_own_setting(manager, name, key, value, when):
    if when == "after" and key in AT_CREATION:
        pytest.skip("counts when the state is created")
    params = [parameter(5000), parameter(70, 80), parameter(5000)]
    twins = copy.deepcopy(params)
    opt, own = make(name, params, 8), make(name, twins[:2], 8)
    plain = make(name, twins[2:], 8)
    for i in range(4):
        if i == (2 if when == "after" else 0):
            manager.override_config(params[:2], key, value)
            if key in own.param_groups[0]:
                own.param_groups[0][key] = value
            else:
                setattr(own.args, key, value)
        set_gradients(params)
        for p in params:
            p.grad.view(-1)[::2] = 0
        follow(params, twins)
        for each in (opt, own, plain):
            each.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)
    for p, twin in zip(params[:2], twins[:2], strict=True):
        assert_same_state(opt.state[p], own.state[twin])
    assert not torch.equal(params[0], params[2])
    assert len(opt._buckets or []) == 0  # the state was looked at


def test_equal_overrides_share_one_call(manager):
    params = [parameter(5000) for _ in range(3)]
    for p in params[:2]:
        manager.override_config(p, "lr", 0.5)
    opt = make("Adam", params, 8)
    set_gradients(params)
    opt.step()
    assert sorted(len(bucket.params) for bucket in opt._buckets) == [1, 2]


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [None, "state1", "max1", "step"])
def test_lists_of_a_graph_are_used_as_long_as_they_hold_the_states(monkeypatch, replaced):
    # What capture and replays do to the optimizer, without a graph.
    params = [parameter(5000), parameter(5000)]
    opt = make("Adam", params, 8, block_wise=False)
    set_gradients(params)
    opt.step()
    with monkeypatch.context() as patch:
        patch.setattr(buckets, "_is_capturing", lambda device: True)
        opt.step()
    (bucket,) = opt._buckets
    for replays in (3, 4):
        bucket.step_tensor.add_(1)
        assert [opt.state[p]["step"] for p in params] == [replays] * 2
    if replaced == "step":
        for p in params:
            opt.state[p]["step"] = 9
    elif replaced:
        opt.state[params[1]][replaced] = opt.state[params[1]][replaced].clone()
    opt.step()
    assert (opt._buckets[0] is bucket) == (replaced is None)
    assert opt.state[params[0]]["step"] == (10 if replaced == "step" else 5)


def test_a_graph_does_not_create_states(monkeypatch):
    p = parameter(50)
    opt = make("Adam", [p], 32)
    set_gradients([p])
    opt.step()
    before = p.detach().clone()
    opt.args.percentile_clipping = 5
    monkeypatch.setattr(buckets, "_is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="gnorm_vec must exist before"):
        opt.step()
    assert torch.equal(p, before)


CAPTURED = [
    *[(name, bits, {}) for name in CLASSES for bits in (8, 32)],
    ("Adam", 8, {"block_wise": False}),
    ("SGD", 8, {"block_wise": False, "percentile_clipping": 20}),
    ("Adam", 32, {"percentile_clipping": 20}),
    ("AdEMAMix", 8, {"t_alpha": 5, "t_beta3": 9, "percentile_clipping": 20}),
    ("Adam", 8, {"stochastic_rounding": True}),
]


@pytest.mark.parametrize(("name", "bits", "kwargs"), CAPTURED)
@pytest.mark.parametrize("look", [False, True])
def test_replays_equal_eager_steps(device, name, bits, kwargs, look):
    if device != "cuda":
        pytest.skip("CUDA graphs exist on CUDA only")
    params = [parameter(*shape, dtype=torch.bfloat16, device=device) for shape in SHAPES]
    twins = copy.deepcopy(params)
    opt, eager = make(name, params, bits, **kwargs), make(name, twins, bits, **kwargs)
    for p in params:
        p.grad = torch.zeros_like(p)

    def gradients():
        for p in params:
            p.grad.copy_(torch.randn_like(p))
        follow(params, twins)

    gradients()
    opt.step()
    eager.step()
    gradients()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for i in range(6):
        gradients()
        if i == 3 and look:
            assert opt.state[params[0]]["step"] == 4
            opt.step()  # an eager one between replays
        else:
            graph.replay()
        eager.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)
        assert_same_state(opt.state[p], eager.state[twin])
