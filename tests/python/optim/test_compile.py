# SPDX-License-Identifier: MIT
"""Compiled steps: one graph, no new ones as steps go on, and the bits of eager steps."""

import copy
import gc
import weakref
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from optim_helpers import assert_same_state
from torch import nn
from torch._dynamo.utils import counters

import bitsandbytes as bnb

RULES = {
    "adam": (bnb.optim.Adam, {}),
    "adamw": (bnb.optim.AdamW, {"weight_decay": 0.1}),
    "ademamix": (bnb.optim.AdEMAMix, {"t_alpha": 3, "t_beta3": 3}),
    "lion": (bnb.optim.Lion, {"weight_decay": 0.1}),
    "sgd": (bnb.optim.SGD, {"momentum": 0.9}),
    "rmsprop": (bnb.optim.RMSprop, {}),
    "adagrad": (bnb.optim.Adagrad, {}),
    "lamb": (bnb.optim.LAMB, {}),
    "lars": (bnb.optim.LARS, {"momentum": 0.9}),
}
STATES = {
    "8bit": {"optim_bits": 8},
    "32bit": {"optim_bits": 32},
    "tensorwise": {"optim_bits": 8, "block_wise": False},
}
CASES = [
    (rule, kind) for rule in RULES for kind in STATES if (rule, kind) != ("ademamix", "tensorwise")
]
SHAPES = ((40, 128), (4100,), (7,))


@contextmanager
def no_recompilation():
    """Every call of compiled code must find code that was compiled before."""
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


class Pair:
    """An optimizer whose step is compiled, and its eager double."""

    def __init__(self, make, device="cpu", dtype=torch.float32, backend="eager", shapes=SHAPES):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        values = [torch.randn(shape).to(dtype).to(device) for shape in shapes]
        self.params, self.doubles = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
        self.optimizer, self.double = make(self.params), make(self.doubles)
        self.compiled = torch.compile(self.optimizer.step, backend=backend, fullgraph=True)

    def both(self, change):
        """Calls change(optimizer, parameters) for each."""
        change(self.optimizer, self.params)
        change(self.double, self.doubles)

    def step(self, count=1, compiled=True, without=()):
        for _ in range(count):
            for i, (p, q) in enumerate(zip(self.params, self.doubles, strict=True)):
                p.grad = None if i in without else torch.randn(p.shape).to(p)
                q.grad = None if i in without else p.grad.clone()
            (self.compiled if compiled else self.optimizer.step)()
            self.double.step()

    def assert_equal(self):
        for p, q in zip(self.params, self.doubles, strict=True):
            assert torch.equal(p, q)
            assert_same_state(self.optimizer.state[p], self.double.state[q])


def adamw8bit(params, **kwargs):
    return bnb.optim.AdamW8bit(params, **{"lr": 1e-2, **kwargs})


def sgd_tensorwise(params):
    return bnb.optim.SGD8bit(params, lr=1e-2, momentum=0.9, block_wise=False)


@pytest.mark.parametrize(("rule", "kind"), CASES)
def test_every_rule_steps_as_in_eager_mode(device, rule, kind):
    cls, kwargs = RULES[rule]
    # The graph of one kind goes through functionalization, too.
    backend = "aot_eager" if kind == "8bit" else "eager"
    pair = Pair(lambda p: cls(p, lr=1e-2, **kwargs, **STATES[kind]), device, backend=backend)
    pair.step()
    with no_recompilation():
        pair.step(9)
    pair.assert_equal()
    assert pair.optimizer.state[pair.params[0]]["step"] == 10
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (torch.float32, {"percentile_clipping": 50}),
        (torch.bfloat16, {"stochastic_rounding": True, "rounding_seed": 2**62}),
        (torch.float16, {}),
    ],
)
def test_options_step_as_in_eager_mode(device, dtype, kwargs):
    pair = Pair(lambda p: adamw8bit(p, **kwargs), device, dtype)
    pair.step()
    with no_recompilation():
        pair.step(3)
    pair.assert_equal()


def test_default_backend(device):
    pair = Pair(adamw8bit, device, backend="inductor")
    pair.step()
    with no_recompilation():
        pair.step(3)
    pair.assert_equal()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_whole_training_step_has_no_breaks_of_its_own(device, set_to_none):
    def train(make, compiled=True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 8)).to(device)
        optimizer = make(model.parameters())

        def step(x, y):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            return loss

        def take(count):
            batches = [(torch.randn(4, 64), torch.randn(4, 8)) for _ in range(count)]
            return [step(x.to(device), y.to(device)) for x, y in batches]

        if compiled:
            step = torch.compile(step, backend="aot_eager")
        losses = take(2)
        with no_recompilation():
            losses += take(8)
        return [loss.item() for loss in losses], sum(counters["graph_break"].values())

    losses, breaks = train(adamw8bit)
    _, breaks_of_torch = train(lambda p: torch.optim.AdamW(p, lr=1e-2))
    assert breaks <= breaks_of_torch
    assert train(adamw8bit, compiled=False)[0] == losses


def set_lr(value):
    return lambda optimizer, _: optimizer.param_groups[0].update(lr=value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_learning_rate_that_changes_compiles_once_more(device, backend):
    pair = Pair(adamw8bit, device, backend=backend)
    pair.step()
    pair.both(set_lr(9e-3))
    pair.step()
    with no_recompilation():
        for i in range(8):
            pair.both(set_lr(8.1e-3 * 0.9**i))
            pair.step()
    pair.assert_equal()


def test_learning_rate_in_a_tensor_compiles_once(device):
    pair = Pair(lambda p: adamw8bit(p, lr=torch.tensor(1e-2, device=device)), device)
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for optimizer in (pair.optimizer, pair.double)
    ]
    pair.step()
    with no_recompilation():
        for _ in range(4):
            for schedule in schedules:
                schedule.step()
            pair.step()
    pair.assert_equal()


def test_learning_rate_in_a_tensor_of_another_device(device):
    pair = Pair(lambda p: adamw8bit(p, lr=torch.tensor(2.0**-7)), device)
    pair.step(2)
    pair.assert_equal()


# ---- Between steps -------------------------------------------------------------------------------


def look(optimizer, params):
    assert [optimizer.state[p]["step"] for p in params] == [2] * len(params)


def reload(optimizer, _):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_other_steps(optimizer, _):
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for state in checkpoint["state"].values():
        state["step"] = 40
    optimizer.load_state_dict(checkpoint)


def replace_entries(optimizer, params):
    for p in params:
        for key, value in optimizer.state[p].items():
            if torch.is_tensor(value):
                optimizer.state[p][key] = value.clone()
    optimizer.state[params[0]]["state1"].zero_()


def replace_state(optimizer, params):
    state = optimizer.state[params[0]]
    optimizer.state[params[0]] = {**state, "state1": torch.zeros_like(state["state1"])}


def step_eagerly(optimizer, params):
    optimizer.step()


def step_by_hand(optimizer, params):
    for p in params:
        optimizer.state[p]["step"] = 7
    optimizer.step()


def rebind_groups(optimizer, _):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]


@pytest.mark.parametrize(
    "change",
    [
        look,
        reload,
        load_other_steps,
        replace_entries,
        replace_state,
        step_eagerly,
        step_by_hand,
        rebind_groups,
    ],
)
def test_change_that_needs_no_new_code(change):
    pair = Pair(adamw8bit)
    pair.step(2)
    pair.both(change)
    with no_recompilation():
        pair.step(2)
    pair.assert_equal()
    pair.step(compiled=False)
    pair.assert_equal()


def add_group(optimizer, params):
    torch.manual_seed(1)
    params.append(nn.Parameter(torch.randn(20)))
    optimizer.add_param_group({"params": params[-1:], "lr": 0.1})


def swap_parameter(optimizer, params):
    params[0] = nn.Parameter(params[0].detach().clone())
    optimizer.param_groups[0]["params"][0] = params[0]


def remove_parameter(optimizer, params):
    params.pop()
    optimizer.param_groups[0]["params"].pop()


def reset(optimizer, _):
    optimizer.state = defaultdict(dict)


def override(optimizer, params):
    bnb.optim.GlobalOptimManager.get_instance().override_config(params[0], "lr", 0.1)


def bound_updates(optimizer, _):
    optimizer.args.max_unorm = 1e-3


@pytest.mark.parametrize(
    "change",
    [
        add_group,
        swap_parameter,
        remove_parameter,
        reset,
        override,
        bound_updates,
        lambda optimizer, _: optimizer.state.clear(),
        lambda optimizer, _: optimizer.param_groups[0].update(weight_decay=0.5),
    ],
)
def test_change_that_needs_new_code(change):
    pair = Pair(adamw8bit)
    pair.step(2)
    pair.both(change)
    pair.step()
    with no_recompilation():
        pair.step()
    pair.assert_equal()
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("change", [reload, replace_entries])
def test_change_of_scales_of_whole_tensors(change):
    pair = Pair(sgd_tensorwise)
    pair.step(2)
    pair.both(change)
    pair.step(2)
    pair.assert_equal()


def test_looks_between_all_steps():
    pair = Pair(adamw8bit)
    pair.step()
    with no_recompilation():
        for taken in range(1, 11):
            assert {state["step"] for state in pair.optimizer.state.values()} == {taken}
            checkpoint = pair.optimizer.state_dict()["state"]
            assert {state["step"] for state in checkpoint.values()} == {taken}
            pair.step()


def test_eager_steps_before():
    pair = Pair(adamw8bit)
    pair.step(2, compiled=False)
    pair.step()
    with no_recompilation():
        pair.step(2)
    pair.assert_equal()


@pytest.mark.parametrize("make", [adamw8bit, sgd_tensorwise])
def test_eager_and_compiled_steps_alternate(make):
    pair = Pair(make)
    pair.step()
    with no_recompilation():
        for _ in range(3):
            pair.step(compiled=False)
            pair.step()
    pair.assert_equal()
    assert pair.optimizer.state[pair.params[0]]["step"] == 7


def test_gradients_that_come_and_go():
    pair = Pair(adamw8bit)
    pair.step(without=(0,))
    assert pair.params[0] not in pair.optimizer.state
    pair.step()
    pair.step(without=(1,))
    pair.step(without=(0, 1, 2))
    pair.step(2)
    pair.assert_equal()
    assert [pair.optimizer.state[p]["step"] for p in pair.params] == [4, 4, 5]


def test_checkpoint_with_states_in_another_order():
    def reload_reversed(optimizer, params):
        checkpoint = copy.deepcopy(optimizer.state_dict())
        checkpoint["state"] = dict(reversed(checkpoint["state"].items()))
        optimizer.load_state_dict(checkpoint)
        assert next(iter(optimizer.state)) is params[1]

    pair = Pair(adamw8bit, shapes=((4100,), (4100,)))
    pair.step()
    pair.both(reload_reversed)
    pair.step(2)
    pair.assert_equal()


def test_groups_and_overrides():
    def make(params):
        manager = bnb.optim.GlobalOptimManager.get_instance()
        manager.override_config(params[1], key_value_dict={"betas": (0.5, 0.9), "optim_bits": 32})
        return adamw8bit([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])

    pair = Pair(make)
    pair.step()
    with no_recompilation():
        pair.step(2)
    pair.assert_equal()
    assert pair.optimizer.state[pair.params[1]]["state1"].dtype == torch.float32


def test_checkpoint_of_compiled_steps_continues_eagerly():
    pair = Pair(adamw8bit)
    pair.step(3)
    pair.params = [nn.Parameter(p.detach().clone()) for p in pair.params]
    checkpoint = copy.deepcopy(pair.optimizer.state_dict())
    pair.optimizer = adamw8bit(pair.params)
    pair.optimizer.load_state_dict(checkpoint)
    pair.step(2, compiled=False)
    pair.assert_equal()


def test_copy_of_an_optimizer_knows_nothing_of_compiled_code():
    pair = Pair(adamw8bit)
    pair.step(2)
    twin = copy.deepcopy(pair.optimizer)
    pair.step(2)
    assert {state["step"] for state in twin.state.values()} == {2}


def test_replaced_states_are_freed():
    pair = Pair(adamw8bit)
    pair.step(2)
    old = [weakref.ref(state["state1"]) for state in pair.optimizer.state.values()]
    pair.both(replace_entries)
    gc.collect()
    assert [reference() for reference in old] == [None] * len(old)


def test_optimizer_can_be_collected():
    pair = Pair(adamw8bit)
    pair.step(2)
    references = [weakref.ref(pair.optimizer)]
    references += [weakref.ref(state["state1"]) for state in pair.optimizer.state.values()]
    del pair
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_error_keeps_its_sentence():
    pair = Pair(adamw8bit)
    pair.optimizer.args.optim_bits = 5
    with pytest.raises(Exception, match="AdamW8bit: optim_bits must be 8 or 32, got 5"):
        pair.step()
