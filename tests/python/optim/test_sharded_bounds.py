# SPDX-License-Identifier: MIT
"""Settings that look at whole tensors, with parameters in parts on several processes."""

import pytest
import torch
from sharded_models import (
    SHAPES,
    Model,
    Parallel,
    assert_same,
    device_type,
    load,
    make,
    mesh,
    save,
    sharded_model,
    train,
    train_parallel,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import bitsandbytes as bnb
from bitsandbytes.optim import engine

# ---- Norms of gradients --------------------------------------------------------------------------


def run_percentile_clipping():
    model, alone = sharded_model(), Model()
    settings = {"momentum": 0.9, "percentile_clipping": 5}
    train(model, make("SGD", model, **settings), range(6))
    train(alone, make("SGD", alone, **settings), range(6))
    free = Model()
    train(free, make("SGD", free, momentum=0.9), range(6))
    for p, q, r in zip(*(m.parameters() for m in (model, alone, free)), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=1e-6)
        assert (q - r).abs().max() > 1e-5


def test_percentile_clipping_uses_norms_of_whole_gradients(pool, backend):
    pool(2, backend, run_percentile_clipping)


def train_loudly(model, optimizer, numbers):
    """Gradients grow and shrink, so that histories decide."""
    for number in numbers:
        (model(number) * 2.0 ** (number * 5 % 7)).backward()
        optimizer.step()
        optimizer.zero_grad()


def clipped(model):
    return make("Adam8bit", model, percentile_clipping=30)


def run_clipped_checkpoint(folder, saves):
    model = sharded_model()
    optimizer = clipped(model)
    if saves:
        train_loudly(model, optimizer, range(6))
        save(model, optimizer, folder)
    resumed, forgetful = sharded_model(), sharded_model()
    again, other = clipped(resumed), clipped(forgetful)
    load(resumed, again, folder)
    load(forgetful, other, folder)
    for (key, p), q in zip(resumed.named_parameters(), model.parameters(), strict=True):
        state = again.state[p]
        # Nothing is left of the step that made the states.
        assert state["step"] == 6
        assert (state["gnorm_vec"] > 0).all(), key
        if saves:
            assert torch.equal(state["gnorm_vec"], optimizer.state[q]["gnorm_vec"]), key
    for state in other.state.values():
        state["gnorm_vec"].fill_(1e30)
    train_loudly(resumed, again, range(6, 9))
    train_loudly(forgetful, other, range(6, 9))
    moved = [
        (whole(p) - whole(q)).abs().max()
        for p, q in zip(*map(list, (resumed.parameters(), forgetful.parameters())), strict=True)
    ]
    assert min(moved) > 1e-4
    if saves:
        train_loudly(model, optimizer, range(6, 9))
        assert_same(resumed, model, tuple(SHAPES))
    else:
        alone = Model()
        train_loudly(alone, clipped(alone), range(9))
        assert_same(resumed, alone, ())


def test_histories_of_gradients_resume(pool, backend, tmp_path):
    pool(2, backend, run_clipped_checkpoint, str(tmp_path), True)
    pool(1, backend, run_clipped_checkpoint, str(tmp_path), False)


def run_asked_before_the_first_step():
    # That takes a step with gradients of zero, which must not count as the norm of any gradient.
    model, alone = sharded_model(), sharded_model()
    optimizers = [make("SGD", m, momentum=0.9, percentile_clipping=30) for m in (model, alone)]
    get_optimizer_state_dict(model, optimizers[0])
    assert not any(state["gnorm_vec"].any() for state in optimizers[0].state.values())
    train_loudly(model, optimizers[0], range(1))
    train_loudly(alone, optimizers[1], range(1))
    assert_same(model, alone, tuple(SHAPES))
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        ours, theirs = (o.state[x]["gnorm_vec"] for o, x in zip(optimizers, (p, q), strict=True))
        assert torch.equal(ours, theirs)
        assert theirs.any()


def test_asking_for_states_leaves_histories_empty(pool, backend):
    pool(2, backend, run_asked_before_the_first_step)


def run_paged_runs():
    # Parts of different sizes must not end the runs of paged states at different parameters: norms
    # of other lists would be added up.
    before, engine.PAGED_RUN = engine.PAGED_RUN, 2**14
    try:
        model, alone = sharded_model(), Model()
        settings = {"percentile_clipping": 5}
        train(model, make("PagedAdam", model, **settings), range(3))
        train(alone, make("PagedAdam", alone, **settings), range(3))
    finally:
        engine.PAGED_RUN = before
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*plain memory")
def test_paged_states_of_uneven_parts_exchange_the_same_lists(pool, backend):
    pool(2, backend, run_paged_runs)


# ---- Norms of updates ----------------------------------------------------------------------------

BOUNDED = {
    "LAMB": {"max_unorm": 0.3},
    "LAMB8bit": {"max_unorm": 0.3, "weight_decay": 0.1},
    "LAMB8bit whole": {"max_unorm": 0.3, "block_wise": False},
    "LARS": {"momentum": 0.9, "weight_decay": 0.01},
    "LARS8bit": {"momentum": 0.9, "percentile_clipping": 5},
    "PytorchLARS": {"momentum": 0.9},
}


def bounded(name, model, **settings):
    return make(name.split()[0], model, **{**BOUNDED[name], **settings})


class Steep(Model):
    """A model whose parameters have another norm in each part."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for p in self.parameters():
                p.mul_(torch.linspace(0.05, 3, p.numel(), device=p.device).view(p.shape))


def assert_close(model, expected, name):
    """Whether models are those of one training, but for roundings of norms and states."""
    for (key, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        error = (whole(p) - whole(q)).abs()
        if name == "LAMB8bit whole":  # scales of parts
            assert error.mean() < 2e-4, (key, error.mean())
        elif "8bit" in name and key in ("odd", "vector"):  # other blocks
            assert error.mean() < 1e-4, (key, error.mean())
        else:
            assert error.max() < 2e-5, (key, error.max())


def run_bounded(name):
    model, alone, free = fully_shard(Steep(), mesh=mesh()), Steep(), Steep()
    optimizer, single = bounded(name, model), bounded(name, alone)
    train(model, optimizer, range(5))
    train(alone, single, range(5))
    assert_close(model, alone, name)
    train(free, bounded(name, free, max_unorm=0.0), range(5))
    for p, q in zip(alone.parameters(), free.parameters(), strict=True):
        assert (p - q).abs().max() > 5e-3
    if name == "PytorchLARS":
        return {}
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        ours, theirs = optimizer.state[p]["unorm_vec"], single.state[q]["unorm_vec"]
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)
    return {key: optimizer.state[p]["unorm_vec"].item() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_are_those_of_whole_tensors(pool, backend, name):
    first, second = pool(2, backend, run_bounded, name)
    assert first == second


def run_bounded_checkpoint(folder):
    model = sharded_model()
    optimizer = bounded("LAMB8bit", model)
    train(model, optimizer, range(3))
    save(model, optimizer, folder)
    resumed = sharded_model()
    again = bounded("LAMB8bit", resumed)
    load(resumed, again, folder)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["unorm_vec"], again.state[q]["unorm_vec"])
    train(model, optimizer, range(3, 5))
    train(resumed, again, range(3, 5))
    assert_same(resumed, model, tuple(SHAPES))


def test_bounded_training_resumes(pool, backend, tmp_path):
    pool(2, backend, run_bounded_checkpoint, str(tmp_path))


def run_parallel():
    # Along any dimension, in replicas, with sums as gradients, and a parameter without dimensions.
    models = Parallel("own"), Parallel(None)
    optimizers = [bnb.optim.LAMB8bit(m.parameters(), lr=1e-2, max_unorm=0.3) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_parallel(model, optimizer, range(4))
    for (key, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        error = (whole(p) - whole(q)).abs()
        assert error.mean() < 1e-4 if key in ("narrow", "last") else error.max() < 1e-5, key


def test_bounds_with_parts_along_any_dimension(pool, backend):
    pool(2, backend, run_parallel)


GRID = {
    "rows": ((8, 1024), (Shard(0), Replicate())),
    "both": ((6, 768), (Shard(0), Shard(1))),
    "columns": ((5, 1030), (Replicate(), Shard(1))),
    "same": ((7, 700), (Replicate(), Replicate())),
    "single": ((1, 4200), (Shard(0), Shard(0))),
    "more": ((9, 512), (Shard(0), Replicate())),
}


def run_grid_of_processes():
    # Classes of parameters whose parts have equal coordinates on some of the processes only: the
    # exchanges must come in one order on all of them.
    grid = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("data", "model"))
    draw = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=draw).to(device_type()) for shape, _ in GRID.values()]
    values = [v * torch.linspace(0.1, 2, v.numel(), device=v.device).view(v.shape) for v in values]
    places = [places for _, places in GRID.values()]
    parts = [
        nn.Parameter(distribute_tensor(value, grid, where))
        for value, where in zip(values, places, strict=True)
    ]
    wholes = [nn.Parameter(value.clone()) for value in values]
    settings = {"lr": 1e-2, "max_unorm": 0.2, "percentile_clipping": 5}
    optimizers = [bnb.optim.LAMB(each, **settings) for each in (parts, wholes)]
    for _ in range(4):
        for p, q in zip(parts, wholes, strict=True):
            q.grad = torch.randn(q.shape, generator=draw).to(q.device)
            p.grad = distribute_tensor(q.grad, grid, p.placements)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(parts, wholes, strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=1e-5)


def run_replicas_of_shards():
    grid = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("replicas", "shards"))
    model, alone = fully_shard(Steep(), mesh=grid), Steep()
    train(model, bounded("LAMB8bit", model), range(3))
    train(alone, bounded("LAMB8bit", alone), range(3))
    assert_close(model, alone, "LAMB8bit")
    return [p.to_local().detach().cpu() for p in model.parameters()]


def run_on_four(pool, backend, function):
    if backend == "nccl" and torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs")
    return pool(4, backend, function)


def test_bounds_on_a_grid_of_processes(pool, backend):
    run_on_four(pool, backend, run_grid_of_processes)


def test_replicas_of_parts_stay_equal(pool, backend):
    first, _, replica, _ = run_on_four(pool, backend, run_replicas_of_shards)
    assert all(map(torch.equal, first, replica))
