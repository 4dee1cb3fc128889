# SPDX-License-Identifier: MIT
"""The engine of the optimizers: states, steps, torch's protocol."""

import copy
import gc
import weakref

import pytest
import torch
from optim_helpers import assert_continues_alike, assert_same_state, fresh, parameter, step, trained
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.optim.optimizer import Optimizer2State

WRAPPED = "__bnb_optimizer_quant_state__"


# --- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5000,), (64, 80), (3, 7, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_8bit_state(device, shape, dtype):
    p = parameter(*shape, dtype=dtype, device=device)
    opt = bnb.optim.Adam8bit([p])
    step(opt, p)
    state = opt.state[p]
    assert list(state) == [
        "step",
        "state1",
        "qmap1",
        "state2",
        "qmap2",
        "absmax1",
        "absmax2",
    ]
    assert state["step"] == 1 and type(state["step"]) is int
    blocks = -(-p.numel() // 256)
    for i, signed in ((1, True), (2, False)):
        assert state[f"state{i}"].dtype == torch.uint8 and state[f"state{i}"].shape == p.shape
        assert state[f"absmax{i}"].dtype == torch.float32
        assert state[f"absmax{i}"].shape == (blocks,)
        assert torch.equal(state[f"qmap{i}"].cpu(), F.create_dynamic_map(signed))
    assert all(v.device == p.device for v in state.values() if torch.is_tensor(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_32bit_state(device, dtype):
    p = parameter(64, 80, dtype=dtype, device=device)
    opt = bnb.optim.Adam32bit([p])
    step(opt, p)
    state = opt.state[p]
    assert list(state) == ["step", "state1", "state2"]
    for key in ("state1", "state2"):
        assert state[key].dtype == torch.float32 and state[key].shape == p.shape
        assert state[key].device == p.device


@pytest.mark.parametrize(
    ("numel", "minimum", "eight_bit"),
    [
        (4095, None, False),
        (4096, None, True),
        (10, 1, True),
        (16383, 16384, False),
        (16384, 16384, True),
        (0, None, False),
    ],
)
def test_size_from_which_states_are_8bit(numel, minimum, eight_bit):
    p = parameter(numel)
    settings = {} if minimum is None else {"min_8bit_size": minimum}
    opt = bnb.optim.Adam8bit([p], **settings)
    step(opt, p)
    assert (opt.state[p]["state1"].dtype == torch.uint8) == eight_bit


def test_qmaps_are_shared_objects(device):
    params = [parameter(5000, device=device) for _ in range(3)]
    opt = bnb.optim.Adam8bit(params)
    step(opt, *params)
    for i, name in ((1, "dynamic"), (2, "udynamic")):
        maps = {id(opt.state[p][f"qmap{i}"]) for p in params}
        assert maps == {id(opt.name2qmap[name])}


def test_qmaps_exist_before_the_first_step():
    opt = bnb.optim.Adam8bit([parameter(3)])
    assert set(opt.name2qmap) == {"dynamic", "udynamic"}
    assert bnb.optim.Adam32bit([parameter(3)]).name2qmap == {}


def test_state_before_any_gradient_means_zero():
    p = parameter(5000)
    opt = bnb.optim.Adam8bit([p])
    opt.init_state(opt.param_groups[0], p, 0, 0)
    state = opt.state[p]
    assert state["step"] == 0
    assert not state["absmax1"].any() and not state["absmax2"].any()


def test_parameters_without_gradient_stay_stateless():
    p, q, frozen = parameter(10), parameter(10), parameter(10)
    frozen.requires_grad_(False)
    before = q.detach().clone()
    opt = bnb.optim.Adam([p, q, frozen])
    step(opt, p)
    assert torch.equal(q, before)
    assert len(opt.state[p]) > 0
    assert q not in opt.state or len(opt.state[q]) == 0
    assert frozen not in opt.state or len(opt.state[frozen]) == 0


def test_non_castable_keys():
    assert set(bnb.optim.Adam.non_castable_tensor_keys) == {
        "qmap1",
        "qmap2",
        "max1",
        "max2",
        "new_max1",
        "new_max2",
        "state1",
        "state2",
        "gnorm_vec",
        "absmax1",
        "absmax2",
        "unorm_vec",
    }
    assert bnb.optim.Adam._FSDP_WRAPPED_QUANT_STATE_KEY == WRAPPED


# --- steps ---------------------------------------------------------------------------------------


def test_step_counts_in_state():
    opt, (p, q) = trained(steps=3)
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (3, 3)
    step(opt, p, q)
    assert [state["step"] for state in opt.state.values()] == [4, 4]
    assert [state["step"] for state in opt.state_dict()["state"].values()] == [4, 4]


@pytest.mark.parametrize("bits", [8, 32])
def test_gradients_that_come_and_go(bits):
    pattern = [(1, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)]
    params = [parameter(5000) for _ in range(3)]
    alone = copy.deepcopy(params)
    opt = bnb.optim.Adam(params, lr=1e-2, optim_bits=bits)
    opts = [bnb.optim.Adam([q], lr=1e-2, optim_bits=bits) for q in alone]
    for present in pattern:
        for here, p, q, single in zip(present, params, alone, opts, strict=True):
            p.grad = torch.randn_like(p) if here else None
            q.grad = None if p.grad is None else p.grad.clone()
            if here:
                single.step()
        opt.step()
    counts = [sum(column) for column in zip(*pattern, strict=True)]
    for p, q, single, count in zip(params, alone, opts, counts, strict=True):
        assert torch.equal(p, q)
        assert opt.state[p]["step"] == count
        assert_same_state(opt.state[p], single.state[q])


def test_state_changed_by_hand_is_seen():
    opt, (p, q) = trained(bits=32)
    opt.state[p]["state1"].zero_()
    opt.state[p]["step"] = 100
    opt.state[q]["state2"] = torch.ones_like(q)
    other, others = trained(bits=32, steps=0)
    for a, b in zip((p, q), others, strict=True):
        b.data.copy_(a.data)
        other.state[b].update({k: copy.deepcopy(v) for k, v in opt.state[a].items()})
    assert_continues_alike(opt, [p, q], other, others)
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (102, 4)


def test_groups_replaced_by_hand_are_seen():
    opt, (p, q) = trained()
    before = p.detach().clone()
    opt.param_groups = [{**group, "lr": 0.0} for group in opt.param_groups]
    step(opt, p, q)
    assert torch.equal(p, before)


def test_state_can_be_cleared():
    opt, (p, q) = trained()
    opt.state.clear()
    step(opt, p, q)
    assert opt.state[p]["step"] == 1


def test_closure():
    p = nn.Parameter(torch.ones(3))
    opt = bnb.optim.Adam([p], lr=0.1)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3.0
    assert len(calls) == 1 and (p < 1).all()
    assert opt.step() is None


def test_hooks():
    calls = []
    p = parameter(5000)
    opt = bnb.optim.Adam8bit([p])
    opt.register_step_pre_hook(lambda *_: calls.append("before step"))
    opt.register_step_post_hook(lambda *_: calls.append("after step"))
    opt.register_state_dict_pre_hook(lambda *_: calls.append("before save"))
    opt.register_state_dict_post_hook(lambda *_: calls.append("after save"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("before load"))
    opt.register_load_state_dict_post_hook(lambda *_: calls.append("after load"))
    step(opt, p)
    opt.load_state_dict(opt.state_dict())
    assert calls == [
        f"{when} {what}" for what in ("step", "save", "load") for when in ("before", "after")
    ]


def test_load_hook_may_replace_the_checkpoint():
    opt, params = trained()
    other, others = fresh(params)
    saved = opt.state_dict()
    other.register_load_state_dict_pre_hook(lambda *_: saved)
    other.load_state_dict({})
    assert_continues_alike(opt, params, other, others)


def test_step_in_the_backward_pass():
    p = parameter(5000)
    opt = bnb.optim.Adam8bit([p], lr=0.1)

    def hook(parameter):
        opt.step()
        opt.zero_grad()

    p.register_post_accumulate_grad_hook(hook)
    before = p.detach().clone()
    p.sum().backward()
    assert p.grad is None and ((before - p).abs() > 0.05).all()


def test_grad_scaler():
    p = nn.Parameter(torch.ones(5000))
    opt = bnb.optim.Adam8bit([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * 2).sum()).backward()
    assert p.grad[0] == 2048
    scaler.step(opt)
    scaler.update()
    assert p.grad[0] == 2 and (p < 1).all() and opt.state[p]["step"] == 1
    opt.zero_grad()
    before = p.detach().clone()
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(p, before) and opt.state[p]["step"] == 1
    assert scaler.get_scale() == 512


def test_add_param_group():
    p, q = parameter(5000), parameter(5000)
    opt = bnb.optim.Adam8bit([p], lr=1e-2)
    step(opt, p)
    opt.add_param_group({"params": [q], "lr": 0.5})
    before = q.detach().clone()
    step(opt, p, q)
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (2, 1)
    # The first step is lr wherever the gradient is not tiny.
    assert ((q - before).abs() - 0.5).abs().median() < 1e-3
    assert opt.param_groups[1]["betas"] == (0.9, 0.999)


def test_sparse_gradient_is_named():
    dense, sparse = parameter(4), parameter(10, 4)
    before = [p.detach().clone() for p in (dense, sparse)]
    opt = bnb.optim.Adam([dense, sparse])
    dense.grad = torch.ones_like(dense)
    sparse.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (10, 4))
    with pytest.raises(RuntimeError, match="gradients must be dense, parameter 1 of group 0"):
        opt.step()
    for p, old in zip((dense, sparse), before, strict=True):
        assert torch.equal(p, old)


def test_sparse_gradient_after_dense_ones_is_named():
    p = parameter(10, 4)
    opt = bnb.optim.Adam([p])
    step(opt, p)
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (10, 4))
    with pytest.raises((RuntimeError, ValueError), match="must be dense"):
        opt.step()
    assert torch.equal(p, before) and opt.state[p]["step"] == 1


def test_step_that_fails_counts_nothing():
    opt, (p, q) = trained()
    opt.state[q]["state1"] = torch.zeros(7)
    with pytest.raises((RuntimeError, ValueError), match="state1"):
        step(opt, p, q)
    assert opt.state[q]["step"] == 2


def test_protocol_of_optimizers_that_drive_single_parameters():
    # As GaLore does it: its own loop, a step it put there itself, p.data of another shape.
    class Projected(Optimizer2State):
        @torch.no_grad()
        def step(self, closure=None):
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for gindex, group in enumerate(self.param_groups):
                for pindex, p in enumerate(group["params"]):
                    state = self.state[p]
                    state.setdefault("step", 0)
                    saved, grad = p.data, p.grad
                    p.data, p.grad = saved[:2].clone(), grad[:2].clone()
                    if "state1" not in state:
                        self.init_state(group, p, gindex, pindex)
                    self.prefetch_state(p)
                    self.update_step(group, p, gindex, pindex)
                    saved[:2] = p.data
                    p.data, p.grad = saved, grad

    p = parameter(4, 8)
    before = p.detach().clone()
    opt = Projected("adam", [p], 0.1, (0.9, 0.999), 1e-8, 0.0, 8, None, 1, 100, True)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    assert p.shape == (4, 8) and opt.state[p]["step"] == 3
    assert opt.state[p]["state1"].shape == (2, 8)
    assert (p[:2] < before[:2] - 0.2).all() and torch.equal(p[2:], before[2:])


def test_single_parameter_step_equals_the_list_step():
    opt, (p, q) = trained()
    other, others = fresh([p, q])
    other.load_state_dict(opt.state_dict())
    for a, b in zip((p, q), others, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    opt.step()
    for index, b in enumerate(others):
        other.update_step(other.param_groups[0], b, 0, index)
    for a, b in zip((p, q), others, strict=True):
        assert torch.equal(a, b)
        assert_same_state(opt.state[a], other.state[b])


def test_optimizer_can_be_collected():
    opt, params = trained()
    reference, first = weakref.ref(opt), weakref.ref(params[0])
    del opt, params
    gc.collect()
    assert reference() is None and first() is None
