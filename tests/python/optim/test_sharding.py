# SPDX-License-Identifier: MIT
"""Steps of optimizers whose parameters PyTorch distributes, on several processes."""

import pytest
import torch
from sharded_models import (
    OPTIMIZERS,
    SHAPES,
    WHOLE,
    Model,
    assert_same,
    device_type,
    exact_names,
    load,
    make,
    mesh,
    save,
    sharded_model,
    train,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import bitsandbytes as bnb


def run_training(name):
    model, alone = sharded_model(), Model()
    train(model, make(name, model), range(5))
    train(alone, make(name, alone), range(5))
    assert_same(model, alone, exact_names(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_one_process(pool, backend, name):
    pool(2, backend, run_training, name)


def run_compiled():
    models = [sharded_model(), sharded_model()]
    optimizers = [make("LAMB8bit", model) for model in models]
    steps = [torch.compile(optimizers[0].step, backend="eager", fullgraph=True)]
    steps.append(optimizers[1].step)
    for number in range(3):
        for model, step in zip(models, steps, strict=True):
            model.zero_grad()
            model(number).backward()
            step()
    assert_same(*models, tuple(SHAPES))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_steps_equal_eager_ones(pool, backend):
    pool(2, backend, run_compiled)


def run_fresh(name):
    model, untouched = sharded_model(), Model()
    optimizer = make(name, model, weight_decay=0.1)
    states = get_optimizer_state_dict(model, optimizer)
    assert_same(model, untouched, tuple(SHAPES))
    table = bnb.functional.create_dynamic_map()
    for p, written in zip(model.parameters(), states["state"].values(), strict=True):
        if "qmap1" in written:
            written["qmap1"].zero_()  # as a checkpoint might write into it
            assert torch.equal(optimizer.state[p]["qmap1"].cpu(), table)
        state = optimizer.state[p]
        assert isinstance(state["state1"], DTensor)
        assert state["state1"].placements[0] == Shard(name == "AdEMAMix8bit")
        assert state["state1"].shape[-p.dim() :] == p.shape
        assert (state["state1"].dtype == torch.uint8) == (
            name.endswith("8bit") and p.numel() >= 4096
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_asking_for_states_changes_no_parameter(pool, backend, name):
    pool(2, backend, run_fresh, name)


# ---- Settings of parts ---------------------------------------------------------------------------


def run_tensor_wise(folder):
    model, alone = sharded_model(), Model()
    optimizer = make("Adam8bit", model, block_wise=False)
    train(model, optimizer, range(3))
    train(alone, make("Adam8bit", alone, block_wise=False), range(3))
    assert_same(model, alone, ("small",))
    save(model, optimizer, folder)
    resumed = sharded_model()
    again = make("Adam8bit", resumed, block_wise=False)
    load(resumed, again, folder)
    assert again.state[resumed.whole]["state1"].dtype == torch.uint8
    train(model, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert_same(resumed, model, tuple(SHAPES))


def test_tensor_wise_states_are_scaled_by_parts(pool, backend, tmp_path):
    pool(2, backend, run_tensor_wise, str(tmp_path))


def run_stochastic_rounding():
    ones = torch.ones(8192, dtype=torch.bfloat16, device=device_type())
    params = [distribute_tensor(ones, mesh(), [place]) for place in (Shard(0), Replicate())]
    for p in params:
        p.grad = torch.ones_like(p)
    bnb.optim.Adam8bit(params, lr=1e-3, stochastic_rounding=True, rounding_seed=5).step()
    return [p.to_local().float().cpu() for p in params]


def test_parts_round_independently_and_replicas_alike(pool, backend):
    (part, replica), (other, same) = pool(2, backend, run_stochastic_rounding)
    assert len(part.unique()) == len(replica.unique()) == 2
    assert not torch.equal(part, other)
    assert torch.equal(replica, same)


def run_mixed():
    model, alone = sharded_model(), Model()
    plain, same = (nn.Parameter(torch.ones(80, 100, device=device_type())) for _ in range(2))
    optimizer = bnb.optim.Adam8bit([*model.parameters(), plain], lr=1e-2)
    single = bnb.optim.Adam8bit([*alone.parameters(), same], lr=1e-2)
    for number in range(3):
        (model(number) + plain.sin().sum()).backward()
        (alone(number) + same.sin().sum()).backward()
        for each in (optimizer, single):
            each.step()
            each.zero_grad()
    assert_same(model, alone, WHOLE)
    assert torch.equal(plain, same)
    again = bnb.optim.Adam8bit([*model.parameters(), plain], lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    for p in (model.odd, plain):
        left, right = again.state[p], optimizer.state[p]
        assert torch.equal(whole(left["state1"]), whole(right["state1"]))
        assert torch.equal(left["absmax2"], right["absmax2"])


def test_plain_parameters_beside_sharded_ones(pool, backend):
    pool(2, backend, run_mixed)


def run_without_synchronisation(name):
    model = sharded_model()
    optimizer = make(name, model)
    train(model, optimizer, range(2))
    model(2).backward()
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["Adam8bit", "LAMB8bit"])
def test_step_does_not_synchronise(pool, backend, name):
    if backend == "gloo":
        pytest.skip("needs two GPUs")
    pool(2, backend, run_without_synchronisation, name)
