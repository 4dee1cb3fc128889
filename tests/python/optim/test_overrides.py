# SPDX-License-Identifier: MIT
"""GlobalOptimManager: settings for single parameters, and for no others."""

import gc
import weakref

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.optim import GlobalOptimManager


@pytest.fixture(autouse=True)
def manager():
    """A manager that knows nothing yet, and forgets what a test told it."""
    instance = GlobalOptimManager.get_instance()
    kept = list(instance.module_weight_config_triple)  # of modules that other tests keep alive
    instance.initialize()
    yield instance
    instance.initialize()
    instance.module_weight_config_triple.extend(kept)


def test_import_paths():
    assert bnb.optim.optimizer.GlobalOptimManager is GlobalOptimManager


def parameter(*shape, device="cpu"):
    return nn.Parameter(torch.randn(shape or (5000,)).to(device))


def step(opt, *params):
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()


def moved(opt, *params):
    """How far one step with gradients of one moves each parameter."""
    before = [p.detach().clone() for p in params]
    step(opt, *params)
    return [(old - p).median().item() for p, old in zip(params, before, strict=True)]


def eight_bit(opt, p):
    return opt.state[p]["state1"].dtype == torch.uint8


def test_singleton(manager):
    assert GlobalOptimManager.get_instance() is manager
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()


def test_documented_order(manager):
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))
    manager.register_parameters(model.parameters())
    manager.override_config(model[1].weight, "optim_bits", 32)
    opt = bnb.optim.Adam8bit(model.parameters())
    step(opt, *model.parameters())
    assert eight_bit(opt, model[0].weight) and not eight_bit(opt, model[1].weight)


def test_override_needs_no_registration(manager):
    p, q = parameter(), parameter()
    manager.override_config(p, "optim_bits", 32)
    opt = bnb.optim.Adam8bit([p, q])
    step(opt, p, q)
    assert not eight_bit(opt, p) and eight_bit(opt, q)
    assert manager.uses_config_override is True


def test_override_before_registration(manager):
    p = parameter()
    manager.override_config(p, "optim_bits", 32)
    manager.register_parameters([p])
    opt = bnb.optim.Adam8bit([p])
    step(opt, p)
    assert not eight_bit(opt, p)


@pytest.mark.parametrize("order", ["register, override", "override, register"])
@pytest.mark.parametrize("grouped", [False, True])
def test_override_survives_a_move_that_replaces_parameters(manager, order, grouped):
    old = [parameter(), parameter()]
    groups = [{"params": [p]} for p in old] if grouped else old
    if order.startswith("override"):
        manager.override_config(old[1], "lr", 0.5)
    manager.register_parameters(groups)
    if order.startswith("register"):
        manager.override_config(old[1], "lr", 0.5)
    new = [nn.Parameter(p.detach().clone()) for p in old]
    del old, groups
    gc.collect()
    opt = bnb.optim.Adam8bit([{"params": [p]} for p in new] if grouped else new, lr=0.125)
    assert moved(opt, *new) == pytest.approx([0.125, 0.5], rel=1e-3)


def test_several_parameters_and_settings(manager):
    p, q, r = parameter(), parameter(), parameter()
    manager.override_config([p, q], key_value_dict={"lr": 0.5, "optim_bits": 32})
    opt = bnb.optim.Adam8bit([p, q, r], lr=0.125)
    assert moved(opt, p, q, r) == pytest.approx([0.5, 0.5, 0.125], rel=1e-3)
    assert [eight_bit(opt, each) for each in (p, q, r)] == [False, False, True]


def test_overrides_of_one_parameter_add_up(manager):
    p = parameter()
    manager.override_config(p, "lr", 0.25)
    manager.override_config(p, "optim_bits", 32)
    manager.override_config(p, "lr", 0.5)
    opt = bnb.optim.Adam8bit([p])
    assert moved(opt, p) == pytest.approx([0.5], rel=1e-3)
    assert not eight_bit(opt, p)


def test_parameters_given_together_stay_apart(manager):
    p, q = parameter(), parameter()
    manager.override_config([p, q], "lr", 0.25)
    manager.override_config(p, "lr", 0.5)
    opt = bnb.optim.Adam([p, q])
    assert moved(opt, p, q) == pytest.approx([0.5, 0.25], rel=1e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("betas", (0.5, 0.6)),
        ("eps", 3.0),
        ("weight_decay", 0.7),
        ("lr", 0.3),
        ("min_8bit_size", 10_000),
        ("skip_zeros", True),
    ],
)
def test_every_setting_equals_the_optimizers_own(manager, key, value):
    p = parameter()
    q = nn.Parameter(p.detach().clone())
    manager.override_config(p, key, value)
    opt, own = bnb.optim.Adam8bit([p]), bnb.optim.Adam8bit([q])
    if key in own.param_groups[0]:
        own.param_groups[0][key] = value
    else:
        setattr(own.args, key, value)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        p.grad[::2] = 0
        q.grad = p.grad.clone()
        opt.step()
        own.step()
    assert torch.equal(p, q)
    assert eight_bit(opt, p) == eight_bit(own, q)
    plain = nn.Parameter(p.detach().clone())
    assert (
        bnb.optim.Adam8bit([plain]).get_config(0, 0, {"params": [plain], **opt.defaults})[key]
        != value
    )


def test_override_applies_at_any_time(manager):
    p = parameter()
    opt = bnb.optim.Adam8bit([p], lr=0.125)
    assert moved(opt, p) == pytest.approx([0.125], rel=1e-3)
    manager.override_config(p, "lr", 0.5)
    assert moved(opt, p) == pytest.approx([0.5], rel=1e-2)
    manager.override_config(p, "optim_bits", 32)  # counts at the first step only
    step(opt, p)
    assert eight_bit(opt, p)


def test_overridden_rate_ignores_schedules(manager):
    p, q = parameter(), parameter()
    manager.override_config(p, "lr", 0.5)
    opt = bnb.optim.Adam([p, q], lr=0.125)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    step(opt, p, q)
    schedule.step()
    assert moved(opt, p, q) == pytest.approx([0.5, 0.0625], rel=1e-2)


def test_unknown_setting_is_kept_and_ignored(manager):
    p = parameter()
    manager.override_config(p, "is_sparse", True)
    opt = bnb.optim.Adam8bit([p], lr=0.125)
    assert moved(opt, p) == pytest.approx([0.125], rel=1e-3)


def test_override_with_nothing_does_nothing(manager):
    p = parameter()
    manager.override_config(p, "lr", None)
    assert manager.uses_config_override is False
    opt = bnb.optim.Adam8bit([p], lr=0.125)
    assert moved(opt, p) == pytest.approx([0.125], rel=1e-3)


def test_both_forms_at_once(manager):
    with pytest.raises((ValueError, AssertionError), match="key_value_dict"):
        manager.override_config(parameter(), "lr", 1.0, {"lr": 1.0})


def test_registering_nothing(manager):
    with pytest.raises((ValueError, IndexError)):
        manager.register_parameters([])


def test_initialize_forgets(manager):
    p = parameter()
    manager.override_config(p, "lr", 0.5)
    manager.initialize()
    assert manager.uses_config_override is False
    opt = bnb.optim.Adam8bit([p], lr=0.125)
    assert moved(opt, p) == pytest.approx([0.125], rel=1e-3)


# --- modules -------------------------------------------------------------------------------------


def test_module_override(manager):
    module = nn.Linear(80, 80)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    module.weight = nn.Parameter(torch.randn(80, 80))  # the name counts, not the tensor
    opt = bnb.optim.Adam8bit(module.parameters())
    step(opt, *module.parameters())
    assert not eight_bit(opt, module.weight)


def test_module_override_of_a_missing_parameter(manager):
    module = nn.Linear(80, 80)
    manager.register_module_override(module, "wait", {"optim_bits": 32})
    opt = bnb.optim.Adam8bit(module.parameters())
    with pytest.raises(AttributeError, match="wait"):
        step(opt, *module.parameters())


@pytest.mark.parametrize("kind", ["Embedding", "StableEmbedding"])
def test_embeddings_keep_32_bit_states(manager, kind):
    module = getattr(bnb.nn, kind)(100, 64)
    plain = nn.Embedding(100, 64)
    opt = bnb.optim.Adam8bit([*module.parameters(), *plain.parameters()])
    step(opt, *module.parameters(), *plain.parameters())
    assert not eight_bit(opt, module.weight)
    assert eight_bit(opt, plain.weight)


def test_every_optimizer_of_a_module_sees_its_override(manager):
    module = bnb.nn.Embedding(100, 64)
    for _ in range(2):
        opt = bnb.optim.Adam8bit(module.parameters())
        step(opt, module.weight)
        assert not eight_bit(opt, module.weight)


# --- no leaks ------------------------------------------------------------------------------------


def test_override_does_not_leak_into_another_optimizer(manager):
    p, other = parameter(), parameter()
    manager.register_parameters([p])
    manager.override_config(p, "lr", 0.5)
    first = bnb.optim.Adam8bit([p], lr=0.125)
    second = bnb.optim.Adam8bit([other], lr=0.125)  # its parameter stands at the same place
    assert moved(first, p) == pytest.approx([0.5], rel=1e-3)
    assert moved(second, other) == pytest.approx([0.125], rel=1e-3)


def test_module_override_does_not_leak_into_another_optimizer(manager):
    embedding, other = bnb.nn.Embedding(100, 64), parameter(100, 64)
    for opt, p, expected in (
        (bnb.optim.Adam8bit([embedding.weight]), embedding.weight, False),
        (bnb.optim.Adam8bit([other]), other, True),
    ):
        step(opt, p)
        assert eight_bit(opt, p) == expected


def test_settings_of_a_dead_parameter_do_not_reach_one_of_another_shape(manager):
    p = parameter(8)
    manager.register_parameters([p])
    manager.override_config(p, "lr", 0.5)
    del p
    gc.collect()
    other = parameter(5, 3)
    opt = bnb.optim.Adam([other], lr=0.125)
    assert moved(opt, other) == pytest.approx([0.125], rel=1e-3)


def test_settings_do_not_pass_to_a_parameter_with_the_same_id(manager):
    p = parameter(4)
    manager.override_config(p, "lr", 0.5)
    key = id(p)
    del p
    gc.collect()
    kept = []
    for _ in range(1000):
        other = parameter(4)
        kept.append(other)
        if id(other) == key:
            break
    # Whether the id came back or not: none of these parameters was named.
    opt = bnb.optim.Adam(kept, lr=0.125)
    assert moved(opt, *kept) == pytest.approx([0.125] * len(kept), rel=1e-3)


def test_manager_keeps_nothing_alive(manager):
    module, p = bnb.nn.Embedding(10, 4), parameter(4)
    manager.register_parameters([p])
    manager.override_config(p, "lr", 0.5)
    manager.override_config(module.weight, "lr", 0.5)
    references = [weakref.ref(module), weakref.ref(p), weakref.ref(module.weight)]
    del module, p
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert len(manager.pid2config) == 0
    step(bnb.optim.Adam([other := parameter(4)]), other)
    assert len(manager.module_weight_config_triple) == 0
