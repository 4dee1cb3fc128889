# SPDX-License-Identifier: MIT
"""What training libraries do to optimizers, imitated without them."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_helpers import assert_continues_alike, assert_same_state, parameter, step
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import bitsandbytes as bnb
from bitsandbytes.optim import GlobalOptimManager

pytestmark = pytest.mark.filterwarnings("ignore:.*paged memory")

# Optimizers that differ in what their states hold.
KINDS = {
    "blockwise": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2),
    "32-bit": lambda p: bnb.optim.AdamW32bit(p, lr=1e-2),
    "tensor-wise": lambda p: bnb.optim.Lion8bit(p, lr=1e-2, block_wise=False),
    "three states": lambda p: bnb.optim.AdEMAMix8bit(p, lr=1e-2, t_alpha=3, t_beta3=5),
    "bounded": lambda p: bnb.optim.LAMB8bit(p, lr=1e-2),
    "clipped": lambda p: bnb.optim.Adam8bit(p, lr=1e-2, percentile_clipping=20),
    "stochastic": lambda p: bnb.optim.Adam8bit(p, lr=1e-2, stochastic_rounding=True),
}


def rebuilt(value, device):
    """As accelerate's prepare does with a state dictionary."""
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(v, device) for v in value)
    if isinstance(value, dict):
        return type(value)({k: rebuilt(v, device) for k, v in value.items()})
    return value.to(device) if torch.is_tensor(value) else value


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_prepare_cycle_of_accelerate(device, kind, steps):
    params = [parameter(70, 80, device=device), parameter(30, device=device)]
    twins = copy.deepcopy(params)
    opt, plain = KINDS[kind](params), KINDS[kind](twins)
    for _ in range(steps):
        step(opt, *params)
        for p, twin in zip(params, twins, strict=True):
            twin.grad = p.grad.clone()
        plain.step()
    opt.load_state_dict(rebuilt(opt.state_dict(), device))
    assert_continues_alike(plain, twins, opt, params)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_every_kind(kind, how):
    params = [parameter(70, 80), parameter(30)]
    opt = KINDS[kind](params)
    step(opt, *params)
    other = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
    assert_continues_alike(opt, params, other, other.param_groups[0]["params"])


def small_model():
    return nn.Sequential(nn.Linear(70, 80), nn.Linear(30, 1))


def through_distributed_checkpoint(saver, loader, folder, **how):
    """Takes model and optimizer of a pair to another pair, as programs with many processes do."""
    weights, states = get_state_dict(*saver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save({"weights": weights, "states": states}, checkpoint_id=folder)
        # To know what to read, torch takes a step with gradients of zero.
        weights, states = get_state_dict(*loader)
        saved = {"weights": weights, "states": states}
        dcp.load(saved, checkpoint_id=folder, **how)
    set_state_dict(*loader, model_state_dict=saved["weights"], optim_state_dict=saved["states"])


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoint_of_one_process(kind, tmp_path):
    model, resumed = small_model(), small_model()
    params, others = list(model.parameters()), list(resumed.parameters())
    opt, other = KINDS[kind](params), KINDS[kind](others)
    for _ in range(3):
        step(opt, *params)
    through_distributed_checkpoint((model, opt), (resumed, other), tmp_path)
    assert other.state[others[0]]["step"] == 3
    assert_continues_alike(opt, params, other, others)


def test_distributed_checkpoint_of_an_optimizer_without_histories(tmp_path):
    model, resumed = small_model(), small_model()
    params, others = list(model.parameters()), list(resumed.parameters())
    opt, other = bnb.optim.Adam8bit(params), KINDS["clipped"](others)
    for _ in range(3):
        step(opt, *params)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    through_distributed_checkpoint((model, opt), (resumed, other), tmp_path, planner=planner)
    step(other, *others)
    # The first norm fills the history; the step that made it left nothing.
    for q in others:
        state, square = other.state[q], q.grad.square().sum()
        assert state["step"] == 4
        torch.testing.assert_close(state["gnorm_vec"], square.expand(100), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_holds_builtins_and_tensors_only(kind):
    params = [parameter(70, 80), parameter(30)]
    opt = KINDS[kind](params)
    step(opt, *params)

    def check(value):
        if isinstance(value, dict):
            for key, entry in value.items():
                assert isinstance(key, (str, int))
                check(entry)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                check(entry)
        else:
            assert value is None or isinstance(value, (bool, int, float, str, torch.Tensor))

    check(opt.state_dict())


TRAINER = [
    *[("AdamW", bits, paged) for bits in (8, 32) for paged in (False, True)],
    *[("AdEMAMix", bits, paged) for bits in (8, 32) for paged in (False, True)],
    *[("Lion", bits, paged) for bits in (8, 32) for paged in (False, True)],
    *[("RMSprop", bits, None) for bits in (8, 32)],
]


@pytest.mark.parametrize(("name", "bits", "paged"), TRAINER)
def test_arguments_of_the_trainer(name, bits, paged):
    # Two groups, keyword arguments, and embeddings in 32 bits by a module override.
    betas = {"AdamW": (0.9, 0.999), "AdEMAMix": (0.9, 0.999, 0.9999), "Lion": (0.9, 0.999)}
    kwargs = {"lr": 5e-5, "optim_bits": bits}
    if paged is not None:
        kwargs |= {"betas": betas[name], "is_paged": paged}
    if name in ("AdamW", "AdEMAMix"):
        kwargs["eps"] = 1e-8
    if name == "AdEMAMix":
        kwargs |= {"alpha": 5.0, "t_alpha": 10, "t_beta3": 10}
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    decayed = [model[0].weight, model[1].weight]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [model[1].bias], "weight_decay": 0.0},
    ]
    cls = getattr(bnb.optim, name)
    assert "bitsandbytes" in str(cls)
    opt = cls(groups, **kwargs)
    if bits == 8:
        manager = GlobalOptimManager.get_instance()
        manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1.0 / (1 + epoch))
    for _ in range(2):
        step(opt, *model.parameters())
        schedule.step()
    dtypes = [opt.state[p]["state1"].dtype for p in decayed]
    assert dtypes == [torch.float32, torch.uint8 if bits == 8 else torch.float32]
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([5e-5 / 3] * 2)


SCHEDULERS = {
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_equal_those_of_torch(name):
    p = parameter(300)
    q = nn.Parameter(p.detach().clone())
    opts = [bnb.optim.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)]
    schedules = [getattr(torch.optim.lr_scheduler, name)(o, **SCHEDULERS[name]) for o in opts]
    for _ in range(6):
        p.grad = torch.randn(300)
        q.grad = p.grad.clone()
        for each in (*opts, *schedules):
            each.step()
        for key in ("lr", "betas"):
            assert opts[0].param_groups[0][key] == pytest.approx(opts[1].param_groups[0][key])
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-3)


def test_scheduler_on_a_plateau():
    p = parameter(3)
    opt = bnb.optim.Lion([p], lr=1.0)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    for loss in (1.0, 2.0, 3.0):
        step(opt, p)
        schedule.step(loss)
    assert opt.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_in_place(device, kind):
    params = [parameter(70, 80, device=device), parameter(30, device=device)]
    opt = KINDS[kind](params)
    for foreach in (True, False):
        for p in params:
            p.grad = torch.randn_like(p) * 100
        norm = nn.utils.clip_grad_norm_(params, 1.0, foreach=foreach)
        assert norm > 100
        before = [(p.detach().clone(), p.grad.clone()) for p in params]
        opt.step()
        for p, (old, grad) in zip(params, before, strict=True):
            assert torch.equal(p.grad, grad) and not torch.equal(p, old)  # no gradient is written


def test_parameters_on_several_devices(device):
    if device == "cpu":
        pytest.skip("one device only")
    here, there = parameter(5000), parameter(5000, device=device)
    twins = copy.deepcopy([here, there])
    opt = bnb.optim.Adam8bit([here, there], percentile_clipping=50)
    alone = [bnb.optim.Adam8bit([p], percentile_clipping=50) for p in twins]
    for _ in range(3):
        for p, twin, single in zip((here, there), twins, alone, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
            single.step()
        opt.step()
    for p, twin, single in zip((here, there), twins, alone, strict=True):
        assert torch.equal(p, twin)
        assert_same_state(opt.state[p], single.state[twin])


@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_that_are_views_of_a_flat_buffer(device, bits):
    # As DeepSpeed and FSDP1 keep them: storage belongs to the buffer, before and after.
    flat, gradients = torch.randn(10_000, device=device), torch.randn(10_000, device=device)
    params = [nn.Parameter(flat[1:5001].view(50, 100)), nn.Parameter(flat[5001:])]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    opt = bnb.optim.AdamW(params, lr=1e-2, optim_bits=bits)
    other = bnb.optim.AdamW(copies, lr=1e-2, optim_bits=bits)
    first = flat[0].clone()
    for _ in range(2):
        for p, twin, grad in zip(
            params, copies, (gradients[1:5001].view(50, 100), gradients[5001:]), strict=True
        ):
            p.grad = grad
            twin.grad = grad.clone()
        opt.step()
        other.step()
    assert torch.equal(flat[1:], torch.cat([p.detach().reshape(-1) for p in copies]))
    assert flat[0] == first


@pytest.mark.parametrize("bits", [8, 32])
def test_data_of_a_parameter_may_be_exchanged(bits):
    p = parameter(5000)
    twin = copy.deepcopy(p)
    opt = bnb.optim.Adam([p], lr=1e-2, optim_bits=bits)
    other = bnb.optim.Adam([twin], lr=1e-2, optim_bits=bits)
    for _ in range(3):
        p.data = p.data.clone()
        step(opt, p)
        twin.grad = p.grad.clone()
        other.step()
    assert torch.equal(p, twin)


def test_names_that_peft_looks_for():
    for name in ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"):
        assert getattr(bnb.optim, name).__name__ == name


@pytest.mark.parametrize("kind", KINDS)
def test_update_in_the_backward_pass(kind):
    params = [parameter(70, 80), parameter(30)]
    opts = {p: KINDS[kind]([p]) for p in params}

    def hook(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(hook)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        sum(p.square().sum() for p in params).backward()
    for p, old in zip(params, before, strict=True):
        assert p.grad is None and opts[p].state[p]["step"] == 2
        assert p.norm() < old.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_are_named(kind):
    p = parameter(10, 4)
    before = p.detach().clone()
    p.grad = torch.eye(10, 4).to_sparse()
    opt = KINDS[kind]([p])
    with pytest.raises(RuntimeError, match="gradients must be dense, parameter 0 of group 0"):
        opt.step()
    assert torch.equal(p, before) and len(opt.state[p]) == 0
