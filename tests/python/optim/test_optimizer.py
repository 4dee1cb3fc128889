# SPDX-License-Identifier: MIT
"""The engine of the optimizers: constructors, states, checkpoints, copies, torch's protocol."""

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.optim.optimizer import MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit

CLASSES = {
    name: getattr(bnb.optim, name)
    for name in ("Adam", "Adam8bit", "Adam32bit", "AdamW", "AdamW8bit", "AdamW32bit")
}
WRAPPED = "__bnb_optimizer_quant_state__"


def parameter(*shape, dtype=torch.float32, device="cpu"):
    return nn.Parameter(torch.randn(shape).to(dtype).to(device))


def step(opt, *params):
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype).to(p.device)
    opt.step()


def trained(bits=8, steps=2, shapes=((5000,), (30,)), **kwargs):
    params = [parameter(*shape) for shape in shapes]
    opt = bnb.optim.AdamW(params, lr=1e-2, optim_bits=bits, **kwargs)
    for _ in range(steps):
        step(opt, *params)
    return opt, params


def fresh(params, **kwargs):
    """An untrained optimizer over copies of parameters."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    return bnb.optim.AdamW(copies, lr=1e-2, optim_bits=8, **kwargs), copies


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if torch.is_tensor(value):
            other = b[key]
            assert value.dtype == other.dtype and torch.equal(value.cpu(), other.cpu()), key
        else:
            assert value == b[key], key


def assert_continues_alike(opt, params, other, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.detach().cpu(), q.detach().cpu())
        assert_same_state(opt.state[p], other.state[q])
    for _ in range(2):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.to(q.device)
        opt.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert_same_state(opt.state[p], other.state[q])


# --- constructors --------------------------------------------------------------------------------

ADAM = [
    "params",
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "optim_bits",
    "args",
    "min_8bit_size",
    "is_paged",
]


@pytest.mark.parametrize("name", CLASSES)
def test_signature(name):
    parameters = inspect.signature(CLASSES[name]).parameters
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == ADAM
    decay = 1e-2 if "W" in name else 0
    assert [p.default for p in positional[1:]] == [
        1e-3,
        (0.9, 0.999),
        1e-8,
        decay,
        False,
        32,
        None,
        4096,
        False,
    ]
    # Keywords of releases up to 0.49.
    assert parameters["percentile_clipping"].default == 100
    assert parameters["block_wise"].default is True


COMMON = ["lr", "betas", "eps", "weight_decay", "optim_bits", "args", "min_8bit_size"]
LEGACY = ["percentile_clipping", "block_wise", "max_unorm", "skip_zeros", "is_paged"]


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (Optimizer1State, ["optimizer_name", "params", *COMMON, *LEGACY]),
        (
            Optimizer2State,
            ["optimizer_name", "params", *COMMON, *LEGACY, "alpha", "t_alpha", "t_beta3"],
        ),
        (Optimizer8bit, ["params", "defaults", "optim_bits", "is_paged"]),
    ],
)
def test_signature_of_the_bases(base, names):
    assert list(inspect.signature(base).parameters) == names


@pytest.mark.parametrize("name", CLASSES)
def test_constructs_by_position_and_by_keyword(name):
    values = [2e-3, (0.8, 0.99), 1e-7, 0.3, False, 32, None, 100, False]
    p = parameter(3)
    for opt in (
        CLASSES[name]([p], *values),
        CLASSES[name]([p], **dict(zip(ADAM[1:], values, strict=True))),
        CLASSES[name](
            [p],
            **dict(zip(ADAM[1:], values, strict=True)),
            percentile_clipping=100,
            block_wise=True,
        ),
    ):
        group = opt.param_groups[0]
        assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == values[:4]
        assert opt.args.min_8bit_size == 100
        assert isinstance(opt, (Optimizer2State, torch.optim.Optimizer))
        assert isinstance(opt, Optimizer8bit) and opt.optimizer_name == "adam"
        assert "bitsandbytes" in str(type(opt))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", CLASSES)
def test_precision_of_the_states(name, bits):
    p = parameter(5000)
    opt = CLASSES[name]([p], optim_bits=bits)
    step(opt, p)
    fixed = 8 if "8bit" in name else 32 if "32bit" in name else bits
    assert opt.state[p]["state1"].dtype == (torch.uint8 if fixed == 8 else torch.float32)


BAD = [
    ({"lr": -1e-3}, "lr"),
    ({"lr": float("nan")}, "lr"),
    ({"eps": -1e-8}, "eps"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"betas": (1.0, 0.999)}, r"betas\[0\]"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
    ({"betas": (0.9, float("nan"))}, r"betas\[1\]"),
    ({"block_wise": False}, "block_wise"),
    ({"percentile_clipping": 5}, "percentile_clipping"),
    ({"optim_bits": 16}, "optim_bits"),
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("kwargs", "argument"), BAD)
def test_bad_setting_gets_a_sentence(name, kwargs, argument):
    if "32bit" in name and "optim_bits" in kwargs:
        pytest.skip("the 32-bit classes ignore optim_bits")
    with pytest.raises(ValueError, match=rf"^{name}: {argument} .*, got "):
        CLASSES[name]([parameter(3)], **kwargs)


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit"])
def test_8bit_classes_refuse_amsgrad(name):
    with pytest.raises(ValueError, match="amsgrad must be False"):
        CLASSES[name]([parameter(3)], amsgrad=True)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("keyword", ["maximize", "foreach", "fused", "capturable", "momentum"])
def test_unknown_keyword(name, keyword):
    with pytest.raises(TypeError, match=keyword):
        CLASSES[name]([parameter(3)], **{keyword: True})


def test_no_parameters():
    with pytest.raises(ValueError, match="empty"):
        bnb.optim.Adam8bit([])


def test_betas_as_text():
    opt = Optimizer2State("adam", [parameter(3)], betas="(0.9, 0.95)")
    assert list(opt.param_groups[0]["betas"]) == [0.9, 0.95]
    with pytest.raises(TypeError, match="betas"):
        Optimizer1State("momentum", [parameter(3)], betas="(0.9, 0.95)")


def test_bases_take_legacy_positions():
    # As third-party subclasses call them: ..., min_8bit_size, percentile_clipping, block_wise.
    p = parameter(3)
    opt = Optimizer2State("adam", [p], 1e-3, (0.9, 0.999), 1e-8, 0.0, 8, None, 1, 100, True)
    step(opt, p)
    assert opt.state[p]["state1"].dtype == torch.uint8
    assert opt.args.max_unorm == 0.0 and opt.args.skip_zeros is False


def test_args_hold_the_settings():
    args = bnb.optim.Adam8bit([parameter(3)], min_8bit_size=7).args
    assert isinstance(args, MockArgs)
    assert (args.optim_bits, args.min_8bit_size) == (8, 7)
    assert (args.max_unorm, args.skip_zeros) == (0.0, False)
    assert (args.percentile_clipping, args.block_wise) == (100, True)


def test_own_args_replace_the_settings():
    own = MockArgs({"optim_bits": 8, "min_8bit_size": 1, "max_unorm": 0.0, "skip_zeros": False})
    p = parameter(3)
    opt = bnb.optim.Adam([p], args=own)
    assert opt.args is own
    step(opt, p)
    assert opt.state[p]["state1"].dtype == torch.uint8


def test_own_args_without_a_setting():
    p = parameter(3)
    opt = bnb.optim.Adam([p], args=MockArgs({"optim_bits": 8}))
    with pytest.raises(AttributeError, match="min_8bit_size"):
        step(opt, p)


def test_paged_says_that_there_is_no_paged_memory():
    with pytest.warns(UserWarning, match="paged memory"):
        opt = bnb.optim.Adam([parameter(3)], is_paged=True)
    assert opt.is_paged is True


def test_names_for_old_imports():
    assert bnb.adam.Adam8bit is bnb.optim.Adam8bit
    assert bnb.optim.adamw.AdamW8bit is bnb.optim.AdamW8bit


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


def test_max_unorm_is_refused_rather_than_dropped():
    own = MockArgs({"optim_bits": 32, "min_8bit_size": 1, "max_unorm": 1.0, "skip_zeros": False})
    p = parameter(3)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="max_unorm must be 0"):
        step(bnb.optim.Adam([p], args=own), p)
    assert torch.equal(p, before)


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


# --- checkpoints ---------------------------------------------------------------------------------


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
    opt = CLASSES[name]([p, q], lr=1e-2)
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


# --- paged classes ------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["Adam", "AdamW", "Lion"])
@pytest.mark.parametrize("suffix", ["", "8bit", "32bit"])
def test_paged_class_warns_once_and_steps_like_its_base(stem, suffix):
    torch.manual_seed(0)
    start, grad = torch.randn(5000), torch.randn(5000)
    results = []
    for name in (f"Paged{stem}{suffix}", f"{stem}{suffix}"):
        p = nn.Parameter(start.clone())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt = getattr(bnb.optim, name)([p], lr=1e-2)
            for _ in range(3):
                p.grad = grad.clone()
                opt.step()
        paged = name.startswith("Paged")
        messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        assert len(messages) == paged and all("paged" in text for text in messages)
        assert opt.is_paged == paged
        results.append(p)
    assert torch.equal(*results)
