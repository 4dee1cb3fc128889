# SPDX-License-Identifier: MIT
"""Checkpoints of every release, misfits, and copies of optimizers."""

import copy
import io
import pickle

import pytest
import torch
from optim_helpers import assert_continues_alike, assert_same_state, fresh, parameter, step, trained
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F

WRAPPED = "__bnb_optimizer_quant_state__"


def test_state_dict_nests_the_tensors():
    opt, _ = trained()
    saved = opt.state_dict()
    assert list(saved) == ["state", "param_groups"]
    large, small = saved["state"][0], saved["state"][1]
    assert set(large) == set(small) == {"step", WRAPPED}
    assert list(large[WRAPPED]) == [
        "state1",
        "qmap1",
        "state2",
        "qmap2",
        "absmax1",
        "absmax2",
    ]
    assert list(small[WRAPPED]) == ["state1", "state2"]
    assert large["step"] == 2 and type(large["step"]) is int
    group = saved["param_groups"][0]
    assert group["params"] == [0, 1] and group["lr"] == 1e-2 and group["weight_decay"] == 1e-2


def test_state_dict_shares_the_tensors_and_leaves_the_state_alone():
    opt, (p, _) = trained()
    saved = opt.state_dict()
    assert saved["state"][0][WRAPPED]["state1"] is opt.state[p]["state1"]
    assert WRAPPED not in opt.state[p]


def flat(saved):
    """The form of releases up to 0.49.1."""
    saved = copy.deepcopy(saved)
    for state in saved["state"].values():
        state.update(state.pop(WRAPPED))
    return saved


FORMS = {"nested": copy.deepcopy, "flat": flat}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [8, 32])
def test_round_trip_is_exact(form, bits):
    opt, params = trained(bits)
    other, others = fresh(params)
    saved = FORMS[form](opt.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert str(saved) == str(kept)
    assert_continues_alike(opt, params, other, others)


@pytest.mark.parametrize("weights_only", [True, False])
def test_round_trip_through_a_file(device, weights_only):
    opt, params = trained()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=weights_only)
    copies = [nn.Parameter(p.detach().to(device, copy=True)) for p in params]
    other = bnb.optim.AdamW(copies, lr=1e-2, optim_bits=8)
    other.load_state_dict(saved)
    for p, q in zip(params, copies, strict=True):
        assert_same_state(opt.state[p], other.state[q])
        tensors = [value for value in other.state[q].values() if torch.is_tensor(value)]
        assert all(value.device.type == device for value in tensors)
    if device == "cpu":
        assert_continues_alike(opt, params, other, copies)


def test_loaded_state_shares_no_memory():
    opt, params = trained()
    other, others = fresh(params)
    saved = opt.state_dict()
    other.load_state_dict(saved)
    before = copy.deepcopy(saved["state"][0][WRAPPED])
    step(other, *others)
    for key, value in before.items():
        assert torch.equal(saved["state"][0][WRAPPED][key], value)


def test_loading_twice_and_over_a_trained_state():
    opt, params = trained()
    other, others = trained(steps=5)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    for _ in range(2):
        other.load_state_dict(opt.state_dict())
    assert_continues_alike(opt, params, other, others)


def test_loaded_qmaps_become_the_shared_ones():
    params = [parameter(5000), parameter(5000)]
    opt = bnb.optim.AdamW8bit(params)
    step(opt, *params)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():  # as separate files of a sharded checkpoint give them
        state[WRAPPED]["qmap1"] = state[WRAPPED]["qmap1"].clone()
    opt.load_state_dict(saved)
    p, q = params
    assert opt.state[p]["qmap1"] is opt.state[q]["qmap1"]


def test_foreign_qmap_is_kept_and_decodes():
    # Up to 0.41.0 the unsigned map was another one; a state carries the map it was written with.
    opt, params = trained(shapes=((5000,),))
    saved = copy.deepcopy(opt.state_dict())
    own = F.create_linear_map(signed=False)
    saved["state"][0][WRAPPED]["qmap2"] = own
    other, (q,) = fresh(params)
    other.load_state_dict(saved)
    assert torch.equal(other.state[q]["qmap2"], own)
    before = other.state[q]["state2"].clone(), other.state[q]["absmax2"].clone()
    q.grad = torch.zeros_like(q)
    other.step()
    v = own[before[0].long()] * before[1].repeat_interleave(256)[:5000] * 0.999
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(v, own, 256)
    # 0.999 in float32 and one rounding: at a threshold the neighbouring code is as good.
    torch.testing.assert_close(other.state[q]["absmax2"], absmax, rtol=1e-6, atol=0)
    assert (other.state[q]["state2"].int() - codes.int()).abs().max() <= 1


def legacy_2048(opt):
    """A checkpoint of 0.43 or older: blocks of 2048."""
    saved = flat(opt.state_dict())
    for state in saved["state"].values():
        if state["state1"].dtype != torch.uint8:
            continue
        for i in (1, 2):
            qmap = state[f"qmap{i}"]
            numbers = torch.randn(state["state1"].shape)
            numbers = numbers if i == 1 else numbers.abs()
            codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(numbers, qmap, 2048)
            state[f"state{i}"], state[f"absmax{i}"] = codes, absmax
    return saved


@pytest.mark.parametrize("shape", [(5000,), (70, 80), (2048 * 3,), (4096,)])
def test_checkpoint_of_2048_blocks_is_requantized(shape):
    opt, params = trained(shapes=(shape,))
    saved = legacy_2048(opt)
    other, (q,) = fresh(params)
    other.load_state_dict(saved)
    state, old = other.state[q], saved["state"][0]
    n = q.numel()
    for i in (1, 2):
        assert state[f"state{i}"].shape == q.shape and state[f"state{i}"].dtype == torch.uint8
        assert state[f"absmax{i}"].shape == (-(-n // 256),)
        qmap = old[f"qmap{i}"]
        was = qmap[old[f"state{i}"].long()].reshape(-1)
        was = was * old[f"absmax{i}"].repeat_interleave(2048)[:n]
        now = qmap[state[f"state{i}"].long()].reshape(-1)
        now = now * state[f"absmax{i}"].repeat_interleave(256)[:n]
        # Half a step of the coarsest decade, 0.9 / 64 (signed) of the block's absmax.
        bound = state[f"absmax{i}"].repeat_interleave(256)[:n] * 0.5 * 0.9 / 64
        # -1 is no level: the largest negative number of a block loses up to 0.71 %.
        assert ((was - now).abs() <= bound * 1.001).all()
    step(other, q)
    assert other.state[q]["step"] == 3


@pytest.mark.parametrize("n", [4096 + 1, 4096 + 200, 5120])
@pytest.mark.parametrize("last", ["in use", "never stepped"])
def test_overlapping_scales_of_ademamix_are_put_right(n, last):
    p = parameter(n)
    opt = bnb.optim.AdEMAMix8bit([p], lr=1e-2)
    opt.args.skip_zeros = last == "never stepped"
    for _ in range(2):
        p.grad = torch.randn(n)
        if last == "never stepped":
            p.grad[-(n % 256 or 256) :] = 0
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    scales = saved["state"][0][WRAPPED]["absmax1"]
    want = scales.clone()
    if last == "in use":
        # As public CUDA kernels lay them out: one shared place, and an empty one at the end.
        flat = torch.zeros(scales.numel())
        flat[: scales.shape[1]] = scales[0]
        flat[n // 256 : n // 256 + scales.shape[1]] = scales[1]
        saved["state"][0][WRAPPED]["absmax1"] = flat.view(scales.shape)
        if n % 256:
            want[0, -1] = scales[1, 0]
    other = bnb.optim.AdEMAMix8bit([nn.Parameter(p.detach().clone())], lr=1e-2)
    other.load_state_dict(saved)
    (state,) = other.state.values()
    assert torch.equal(state["absmax1"], want)
    assert torch.equal(state["state1"], opt.state[p]["state1"])
    step(other, *other.param_groups[0]["params"])


def test_tensor_wise_checkpoint_of_old_releases():
    # Flat, without new_max: those of the step before last may be missing.
    p = parameter(5000)
    opt = bnb.optim.Adam8bit([p], lr=1e-2, block_wise=False, percentile_clipping=50)
    for _ in range(2):
        step(opt, p)
    saved = flat(opt.state_dict())
    for key in ("new_max1", "new_max2"):
        del saved["state"][0][key]
    q = nn.Parameter(p.detach().clone())
    # Settings decide on new states only: the parameter goes on tensor-wise.
    other = bnb.optim.Adam8bit([q], lr=1e-2, percentile_clipping=50)
    other.load_state_dict(saved)
    p.grad = torch.randn_like(p)
    q.grad = p.grad.clone()
    opt.step()
    other.step()
    assert torch.equal(p, q)
    assert_same_state(opt.state[p], other.state[q])


def test_equal_foreign_maps_become_one():
    params = [parameter(5000), parameter(5000)]
    opt = bnb.optim.AdamW8bit(params)
    step(opt, *params)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state[WRAPPED]["qmap2"] = F.create_linear_map(signed=False)
    opt.load_state_dict(saved)
    p, q = params
    assert opt.state[p]["qmap2"] is opt.state[q]["qmap2"]


def test_number_of_the_step_as_a_tensor():
    opt, params = trained()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = torch.tensor(2.0)
    other, others = fresh(params)
    other.load_state_dict(saved)
    assert_continues_alike(opt, params, other, others)


@pytest.mark.parametrize("number", [-1, 2**63, 1.5, None, float("nan"), "3", []])
def test_what_is_no_number_of_steps(number):
    opt, params = trained()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1]["step"] = number
    before = [copy.deepcopy(opt.state[p]) for p in params]
    with pytest.raises(ValueError, match=r"state of parameter 1: step must be an int from 0"):
        opt.load_state_dict(saved)
    for p, state in zip(params, before, strict=True):
        assert_same_state(opt.state[p], state)


def test_other_entries_keep_their_type():
    opt, params = trained(bits=32)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0] |= {
        "count": torch.tensor(3),
        "name": "galore",
        "flag": True,
        "list": [1, 2],
        "float": torch.ones(2, dtype=torch.float64),
    }
    other, (p, _) = fresh(params)
    other.load_state_dict(saved)
    state = other.state[p]
    assert state["count"].dtype == torch.int64 and state["count"].item() == 3
    assert (state["name"], state["flag"], state["list"]) == ("galore", True, [1, 2])
    assert state["float"].dtype == torch.float32  # as torch casts: to the parameter's dtype


def test_bfloat16_parameter_keeps_float32_states():
    p = parameter(30, dtype=torch.bfloat16)
    opt = bnb.optim.Adam([p])
    step(opt, p)
    other = bnb.optim.Adam([nn.Parameter(p.detach().clone())])
    other.load_state_dict(opt.state_dict())
    state = next(iter(other.state.values()))
    assert state["state1"].dtype == torch.float32
    assert_same_state(state, opt.state[p])


def test_state_may_stay_where_it_is(device):
    opt, params = trained()
    copies = [nn.Parameter(p.detach().to(device, copy=True)) for p in params]
    other = bnb.optim.AdamW(copies, lr=1e-2, optim_bits=8)
    other.load_state_dict(opt.state_dict(), move_to_device=False)
    assert other.state[copies[0]]["state1"].device.type == "cpu"
    step(other, *copies)  # the first step brings it
    assert other.state[copies[0]]["state1"].device.type == device
    assert other.state[copies[0]]["step"] == 3


def test_settings_that_a_checkpoint_lacks_stay():
    opt, params = trained()
    saved = copy.deepcopy(opt.state_dict())
    del saved["param_groups"][0]["betas"]
    saved["param_groups"][0]["lr"] = 0.125
    saved["param_groups"][0]["initial_lr"] = 0.5
    other, others = fresh(params, betas=(0.5, 0.6))
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["betas"] == (0.5, 0.6) and group["lr"] == 0.125 and group["initial_lr"] == 0.5
    assert all(a is b for a, b in zip(group["params"], others, strict=True))


def test_partial_checkpoint():
    params = [parameter(5000), parameter(5000)]
    opt = bnb.optim.AdamW8bit(params, lr=1e-2)
    step(opt, params[0])
    other, others = fresh(params)
    other.load_state_dict(opt.state_dict())
    step(other, *others)
    assert [other.state[q]["step"] for q in others] == [2, 1]


def spoil(change):
    """A checkpoint of trained() after change(inner state of parameter 0, whole checkpoint)."""

    def make(opt):
        saved = copy.deepcopy(opt.state_dict())
        change(saved["state"][0][WRAPPED], saved)
        return saved

    return make


MISFITS = {
    "number of groups": (
        spoil(lambda s, c: c["param_groups"].append(c["param_groups"][0])),
        "1 parameter groups",
    ),
    "length of a group": (
        spoil(lambda s, c: c["param_groups"][0]["params"].pop()),
        "group 0 .* 2 parameters, got 1",
    ),
    "shape": (
        spoil(lambda s, c: s.update(state1=s["state1"].view(50, 100))),
        r"parameter 0: state1 .*shape \(5000,\), got \(50, 100\)",
    ),
    "shape of the second": (
        spoil(lambda s, c: s.update(state2=s["state2"][1:])),
        "parameter 0: state2",
    ),
    "dtype": (
        spoil(lambda s, c: s.update(state1=s["state1"].half())),
        "parameter 0: state1 must be uint8 or float32, got torch.float16",
    ),
    "not a tensor": (spoil(lambda s, c: s.update(state2=3)), "parameter 0: state2 .* got int"),
    "blocks": (
        spoil(lambda s, c: s.update(absmax1=s["absmax1"][:7])),
        "parameter 0: absmax1 must have 20 elements",
    ),
    "dtype of the scales": (
        spoil(lambda s, c: s.update(absmax1=s["absmax1"].double())),
        "parameter 0: absmax1",
    ),
    "no scales": (spoil(lambda s, c: s.pop("absmax2")), "parameter 0: absmax2"),
    "no table": (spoil(lambda s, c: s.pop("qmap1")), "parameter 0: qmap1"),
    "short table": (
        spoil(lambda s, c: s.update(qmap2=s["qmap2"][:255])),
        "parameter 0: qmap2",
    ),
    "one of two states": (spoil(lambda s, c: s.pop("state2")), "parameter 0: state2"),
    "mixed precision": (
        spoil(lambda s, c: s.update(state2=torch.zeros(5000))),
        "parameter 0: state2",
    ),
    "unorm_vec": (
        spoil(lambda s, c: s.update(unorm_vec=torch.zeros(2))),
        "parameter 0: unorm_vec .* 1 elements",
    ),
    "gnorm_vec": (
        spoil(lambda s, c: s.update(gnorm_vec=torch.zeros(99))),
        "parameter 0: gnorm_vec .* 100 elements",
    ),
    "tensor-wise and blockwise": (
        spoil(lambda s, c: (s.pop("absmax1"), s.update(max1=torch.zeros(1)))),
        "parameter 0: max2",
    ),
    "no step": (spoil(lambda s, c: c["state"][0].pop("step")), "parameter 0: step"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_checkpoint_that_does_not_fit_is_refused_by_name(name):
    make, message = MISFITS[name]
    opt, params = trained()
    saved = make(opt)
    before = copy.deepcopy([dict(opt.state[p]) for p in params])
    groups = copy.deepcopy([{**g, "params": None} for g in opt.param_groups])
    with pytest.raises(ValueError, match=f"load_state_dict: .*{message}"):
        opt.load_state_dict(saved)
    for p, state in zip(params, before, strict=True):
        assert_same_state(opt.state[p], state)
    assert [{**g, "params": None} for g in opt.param_groups] == groups
    step(opt, *params)


def test_state_of_torch_adam_is_named_not_misread():
    p = parameter(5000)
    other = torch.optim.Adam([p])
    step(other, p)
    opt = bnb.optim.Adam8bit([p])
    with pytest.raises((ValueError, RuntimeError), match="state1"):
        opt.load_state_dict(other.state_dict())
        step(opt, p)


# --- copies --------------------------------------------------------------------------------------


def by_torch_save(opt):
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW32bit"])
def test_copies_keep_working(how, name):
    p, q = parameter(5000), parameter(30)
    opt = getattr(bnb.optim, name)([p, q], lr=1e-2)
    for _ in range(2):
        step(opt, p, q)
    other = COPIES[how](opt)
    assert type(other) is type(opt)
    others = other.param_groups[0]["params"]
    assert others[0] is not p and others[0].data_ptr() != p.data_ptr()
    assert (other.args.optim_bits, other.optimizer_name) == (opt.args.optim_bits, "adam")
    assert_continues_alike(opt, [p, q], other, others)


def test_copy_of_an_untrained_optimizer():
    opt = copy.deepcopy(bnb.optim.Adam8bit([parameter(5000)]))
    p = opt.param_groups[0]["params"][0]
    step(opt, p)
    assert opt.state[p]["step"] == 1


def test_model_and_optimizer_copied_together():
    model = nn.Linear(64, 128)
    opt = bnb.optim.Adam8bit(model.parameters(), lr=0.1)
    step(opt, *model.parameters())
    model2, opt2 = copy.deepcopy((model, opt))
    before = model2.weight.detach().clone()
    step(opt2, *model2.parameters())
    assert not torch.equal(model2.weight, before)
    assert opt2.state[model2.weight]["step"] == 2 and opt.state[model.weight]["step"] == 1


def test_repr_names_class_and_settings():
    text = repr(bnb.optim.AdamW8bit([parameter(3)], lr=0.25))
    assert text.startswith("AdamW8bit (") and "lr: 0.25" in text
