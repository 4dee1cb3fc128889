# SPDX-License-Identifier: MIT
"""FullyShardedDataParallel, and replicas with ZeroRedundancyOptimizer, on several processes."""

import warnings

import pytest
import torch
from sharded_models import SHAPES, Model, assert_same, device_type, make, sharded_model, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import bitsandbytes as bnb


def flat_device():
    rank = torch.distributed.get_rank()
    return torch.device("cuda", rank) if device_type() == "cuda" else torch.device("cpu")


def flat_model(use_orig_params):
    model = FSDP(Model(), use_orig_params=use_orig_params, device_id=flat_device())
    # On the CPU, torch moves states "to the CPU" by handing out a buffer that it uses again.
    full = FullOptimStateDictConfig(offload_to_cpu=False)
    FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), full)
    return model


def assert_same_flat(model, expected, exact):
    with FSDP.summon_full_params(model):
        if isinstance(expected, FSDP):
            with FSDP.summon_full_params(expected):
                assert_same(model.module, expected.module, exact)
        else:
            assert_same(model.module, expected, exact)


def run_flat(name, use_orig_params, how):
    warnings.simplefilter("ignore", FutureWarning)
    model, alone = flat_model(use_orig_params), Model()
    optimizer = make(name, model)
    train(model, optimizer, range(3))
    train(alone, make(name, alone), range(3))
    assert_same_flat(model, alone, () if name.endswith("8bit") else tuple(SHAPES))

    resumed = flat_model(use_orig_params)
    resumed.load_state_dict(model.state_dict())
    again = make(name, resumed)
    if how == "local":
        again.load_state_dict(optimizer.state_dict())
    elif how == "full":
        state = FSDP.optim_state_dict(model, optimizer)
        for key, shape in SHAPES.items():
            assert state["state"][key]["state2" if "Lion" not in name else "state1"].shape == shape
        again.load_state_dict(FSDP.optim_state_dict_to_load(resumed, again, state))
    else:
        state = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(resumed, again, state)
    train(model, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert_same_flat(resumed, model, tuple(SHAPES))


@pytest.mark.parametrize("how", ["local", "full", "sharded"])
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("name", ["Adam8bit", "Adam", "AdEMAMix8bit"])
def test_flattened_parameters(pool, backend, name, use_orig_params, how):
    pool(2, backend, run_flat, name, use_orig_params, how)


def run_flat_to_fully_shard():
    warnings.simplefilter("ignore", FutureWarning)
    model = flat_model(True)
    optimizer = make("Adam8bit", model)
    train(model, optimizer, range(3))
    state = FSDP.optim_state_dict(model, optimizer)
    sharded = sharded_model()
    again = make("Adam8bit", sharded)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(sharded, again, state, options=options)
    with torch.no_grad(), FSDP.summon_full_params(model):
        for p, q in zip(sharded.parameters(), model.module.parameters(), strict=True):
            p.copy_(distribute_tensor(q.detach().clone(), p.device_mesh, p.placements))
    assert again.state[sharded.odd]["state1"].dtype == torch.uint8
    train(model, optimizer, range(3, 6))
    train(sharded, again, range(3, 6))
    with FSDP.summon_full_params(model):
        assert_same(sharded, model.module, ("small",))


def test_from_flattened_parameters_to_fully_shard(pool, backend):
    pool(2, backend, run_flat_to_fully_shard)


def run_flat_bounds():
    warnings.simplefilter("ignore", FutureWarning)
    model = flat_model(True)
    model(0).backward()
    for name, settings, refused in (
        ("LAMB", {}, "max_unorm must be 0"),
        ("PytorchLARS", {}, "max_unorm must be 0"),
        ("Adam", {"percentile_clipping": 5}, "percentile_clipping must be 100"),
    ):
        message = f"step: {refused} for parameters flattened by FullyShardedDataParallel"
        with pytest.raises(ValueError, match=message):
            make(name, model, **settings).step()
    assert_same_flat(model, Model(), tuple(SHAPES))


def test_bounds_on_whole_tensors_are_refused_for_flattened_parameters(pool, backend):
    pool(2, backend, run_flat_bounds)


def run_flat_stochastic_rounding():
    warnings.simplefilter("ignore", FutureWarning)
    ones = nn.Linear(64, 128, bias=False, dtype=torch.bfloat16, device=device_type())
    nn.init.ones_(ones.weight)
    model = FSDP(ones, use_orig_params=True, device_id=flat_device())
    model(torch.ones(1, 64, dtype=torch.bfloat16, device=device_type())).sum().backward()
    settings = {"stochastic_rounding": True, "rounding_seed": 5}
    bnb.optim.Adam8bit(model.parameters(), lr=1e-3, **settings).step()
    return [p.detach().float().cpu() for p in model.parameters()]


def test_flattened_parameters_round_alike(pool, backend):
    (first,), (second,) = pool(2, backend, run_flat_stochastic_rounding)
    assert len(first.unique()) == 2
    assert torch.equal(first, second)


def run_zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns

    model, alone = DistributedDataParallel(Model()), Model()
    settings = {"optimizer_class": bnb.optim.Adam8bit, "lr": 1e-2}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), **settings)
    single = make("Adam8bit", alone)
    train(model, optimizer, range(3))
    train(alone, single, range(3))
    assert_same(model.module, alone, tuple(SHAPES))
    optimizer.consolidate_state_dict(to=0)
    states = [optimizer.state_dict() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(states, src=0)
    again = make("Adam8bit", alone)
    again.load_state_dict(states[0])
    resumed = ZeroRedundancyOptimizer(model.parameters(), **settings)
    resumed.load_state_dict(states[0])
    train(model, resumed, range(3, 6))
    train(alone, again, range(3, 6))
    assert_same(model.module, alone, tuple(SHAPES))


def test_zero_redundancy_optimizer(pool, backend):
    pool(2, backend, run_zero)
