# SPDX-License-Identifier: MIT
"""Checkpoints of optimizers whose parameters are DTensors, on several processes."""

import warnings

import numpy as np
import pytest
import torch
from sharded_models import (
    OPTIMIZERS,
    PARALLEL,
    SHAPES,
    WHOLE,
    Model,
    Parallel,
    assert_same,
    device_type,
    exact_names,
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import bitsandbytes as bnb
from bitsandbytes.optim import sharding
from reference import codes as reference


def run_part(name, folder, first, last, options):
    """Resumes from a checkpoint, if there is one, takes steps and saves another one."""
    model = sharded_model()
    optimizer = make(name, model)
    if first:
        load(model, optimizer, f"{folder}/{first}", **options)
        assert all(state["step"] == first for state in optimizer.state.values())
    train(model, optimizer, range(first, last))
    save(model, optimizer, f"{folder}/{last}", **options)
    alone = Model()
    train(alone, make(name, alone), range(last))
    assert_same(model, alone, exact_names(name))


FLAT = {"flatten_optimizer_state_dict": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in OPTIMIZERS), ("Adam8bit", FLAT), ("AdEMAMix8bit", FLAT)],
    ids=str,
)
def test_resume_with_another_number_of_processes(pool, backend, tmp_path, name, options):
    worlds = (2, 1, 2) if backend == "nccl" else (2, 1, 3)
    for i, world in enumerate(worlds):
        pool(world, backend, run_part, name, str(tmp_path), 3 * i, 3 * i + 3, options)


def run_same_world(name, folder, options):
    model = sharded_model()
    optimizer = make(name, model)
    train(model, optimizer, range(3))
    save(model, optimizer, folder, **options)
    train(model, optimizer, range(3, 6))
    resumed = sharded_model()
    again = make(name, resumed)
    load(resumed, again, folder, **options)
    train(resumed, again, range(3, 6))
    assert_same(resumed, model, tuple(SHAPES))


@pytest.mark.parametrize("options", [{}, FLAT, {"cpu_offload": True}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact_where_blocks_stay(pool, backend, tmp_path, name, options):
    pool(2, backend, run_same_world, name, str(tmp_path), options)


def run_whole_dict(name):
    """By dictionaries of whole tensors, from one process to all and back."""
    model = sharded_model()
    optimizer = make(name, model)
    train(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    weights = {key: whole(value) for key, value in model.state_dict().items()}
    first = torch.distributed.get_rank() == 0
    assert bool(state) == first

    resumed = sharded_model()
    resumed.load_state_dict(model.state_dict())
    again = make(name, resumed)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(resumed, again, state if first else {}, options=options)
    train(model, optimizer, range(3, 6))
    train(resumed, again, range(3, 6))
    assert_same(resumed, model, tuple(SHAPES))

    if first:
        alone = Model()
        alone.load_state_dict(weights)
        single = make(name, alone)
        set_optimizer_state_dict(alone, single, state)
        train(alone, single, range(3, 6))
    torch.distributed.barrier()
    if first:
        reference = Model()
        train(reference, make(name, reference), range(6))
        assert_same(alone, reference, exact_names(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_state_dict(pool, backend, name):
    pool(2, backend, run_whole_dict, name)


def run_states(folder, steps):
    """Returns (codes, absmax) of this process after `steps` steps or after loading."""
    model = sharded_model()
    optimizer = make("Adam8bit", model)
    if steps:
        train(model, optimizer, range(steps))
        save(model, optimizer, folder)
    else:
        load(model, optimizer, folder)
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        for i in (1, 2) if "absmax1" in state else ():
            tensors = state[f"state{i}"].to_local().flatten(), state[f"absmax{i}"]
            found[name, i] = tuple(tensor.cpu().numpy() for tensor in tensors)
    return found


def test_states_in_other_blocks_stay_within_a_code_step(pool, backend, tmp_path):
    before = pool(2, backend, run_states, str(tmp_path), 4)
    after = pool(1, backend, run_states, str(tmp_path), 0)
    assert before[0].keys() == before[1].keys() == after[0].keys()
    for (name, i), (codes, absmax) in after[0].items():
        levels = reference.dynamic_map(signed=i == 1)
        parts = [rank[name, i] for rank in before]
        if name in WHOLE:
            assert np.array_equal(codes, np.concatenate([part[0] for part in parts])), name
            assert np.array_equal(absmax, np.concatenate([part[1] for part in parts])), name
            continue
        old = np.concatenate([reference.dequantize(levels, *part, 256) for part in parts])
        new = reference.dequantize(levels, codes, absmax, 256)
        gaps = np.diff(levels, prepend=-np.inf, append=np.inf)
        gaps = np.where(np.isinf(gaps), 0, gaps)
        step = np.maximum(gaps[:-1], gaps[1:])[codes] * np.repeat(absmax, 256)[: codes.size]
        assert (np.abs(new - old) <= step * (1 + 1e-5)).all(), name
        assert not np.array_equal(new, old), name  # otherwise there were no other blocks


@pytest.mark.parametrize("kind", ["dynamic", "udynamic"])
def test_numbers_give_back_codes_and_scales(device, kind):
    code = bnb.functional.create_dynamic_map(kind == "dynamic").to(device)
    n = 300 * 256 + 77
    codes = torch.randint(0, 256, (n,), dtype=torch.uint8, device=device)
    absmax = (torch.randn(301) * 8).exp().to(device)
    # The largest number of a block has the outermost code: the upper, or the lower if signed.
    ends = torch.arange(301) % 2 * 255 if kind == "dynamic" else torch.full((301,), 255)
    codes[::256] = ends.to(torch.uint8).to(device)
    numbers = sharding._numbers(codes, absmax, code)
    again = sharding._quantized(numbers, code, 256)
    assert torch.equal(again[0], codes) and torch.equal(again[1], absmax)


def test_numbers_keep_their_sign(device):
    code = bnb.functional.create_dynamic_map().to(device)
    numbers = torch.tensor([1.0, -1e-30, 0.0], device=device)
    codes, _ = sharding._quantized(numbers, code, 256)
    assert code[codes.long()].sign().tolist() == [1.0, -1.0, 0.0]


def run_refused(folder):
    model = sharded_model()
    optimizer = make("Adam8bit", model)
    train(model, optimizer, range(2))
    save(model, optimizer, folder)
    other = make("Adam32bit", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BaseException, match=r"Size mismatch between saved .* 256\]"):
            load(model, other, folder)


def test_codes_are_not_read_as_numbers(pool, backend, tmp_path):
    pool(2, backend, run_refused, str(tmp_path))


def spoiled(states, **entries):
    return {0: {**states["state"][0], **entries}}


def run_misfits():
    model, alone = sharded_model(), Model()
    optimizer, single = make("Adam8bit", model), make("Adam8bit", alone)
    train(model, optimizer, range(1))
    states = optimizer.state_dict()
    first = states["state"][0]
    rows = DTensor.from_local(torch.zeros(3, 2, 256, dtype=torch.uint8), mesh(), [Shard(0)])
    columns = first["state1"].redistribute(placements=[Shard(1)])
    numbers = distribute_tensor(torch.zeros(11, 512), mesh(), [Shard(0)], src_data_rank=None)
    short = {"state1": numbers, "state2": numbers, "qmap1": torch.zeros(255)}
    for target, entries, message in (
        (optimizer, {"state1": rows}, "state1 must be a DTensor of shape .11, 2, 256. placed"),
        (optimizer, {"absmax2": columns}, "absmax2 must be a DTensor"),
        (optimizer, {"state1": columns}, "state1 must be a DTensor"),
        (optimizer, {"state1": {}}, "state1 must be uint8 or float32, got dict"),
        (optimizer, short, "qmap1 must be a table of 256 levels, got .255."),
        (optimizer, {"state2": numbers}, "state2 must be"),
        (single, {}, "state1 must be a plain tensor like its parameter"),
    ):
        saved = {**states, "state": spoiled(states, **entries)}
        with pytest.raises(ValueError, match=f"load_state_dict: .* parameter 0: {message}"):
            target.load_state_dict(saved)
    assert torch.equal(
        whole(optimizer.state[model.whole]["state1"]), whole(first["state1"]).view(11, 512)
    )


def test_states_that_do_not_fit_are_refused_by_name(pool):
    pool(2, "gloo", run_misfits)


# ---- Dictionaries of whole tensors ---------------------------------------------------------------


def run_from_one_process(name, full):
    """States of a model on one process, as torch.save keeps them, continue on several."""
    alone = Model()
    single = make(name, alone)
    train(alone, single, range(3))
    state = get_optimizer_state_dict(alone, single)
    model = sharded_model()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        with torch.no_grad():
            p.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements))
    optimizer = make(name, model)
    options = StateDictOptions(full_state_dict=full)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert optimizer.state[p]["state1"].dtype == single.state[q]["state1"].dtype
        assert optimizer.state[p]["step"] == 3
    train(alone, single, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert_same(model, alone, exact_names(name))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["Adam8bit", "Adam", "AdEMAMix8bit"])
def test_states_of_one_process_continue_on_several(pool, backend, name, full):
    pool(2, backend, run_from_one_process, name, full)


# ---- Tensor parallelism --------------------------------------------------------------------------


def run_parallel(name, folder):
    model, alone = Parallel("own"), Parallel(None)
    optimizer, single = make(name, model), make(name, alone)
    train_parallel(model, optimizer, range(3))
    train_parallel(alone, single, range(3))
    exact = [key for key, (_, _, by_blocks) in PARALLEL.items() if by_blocks is not False]
    assert_same(model, alone, exact)
    written = get_optimizer_state_dict(model, optimizer)["state"]
    for key, (shape, _, by_blocks) in PARALLEL.items():
        assert ("absmax1" in written[key]) == bool(by_blocks), key
        if by_blocks is False:
            assert written[key]["state2"].shape == shape

    save(model, optimizer, folder)
    resumed = Parallel("own")
    again = make(name, resumed)
    load(resumed, again, folder)
    train_parallel(model, optimizer, range(3, 6))
    train_parallel(resumed, again, range(3, 6))
    assert_same(resumed, model, tuple(PARALLEL))


@pytest.mark.parametrize("name", ["Adam8bit", "AdEMAMix8bit"])
def test_other_placements_than_rows(pool, backend, tmp_path, name):
    pool(2, backend, run_parallel, name, str(tmp_path))


def run_replaced(folder):
    """From shards of columns to shards of rows."""
    model = Parallel("own")
    for key in ("narrow", "last"):
        delattr(model, key)
    optimizer = make("Adam8bit", model)
    train_parallel(model, optimizer, range(3))
    save(model, optimizer, folder)
    resumed = Parallel("rows")
    for key in ("narrow", "last"):
        delattr(resumed, key)
    again = make("Adam8bit", resumed)
    load(resumed, again, folder)
    for p, q in zip(resumed.parameters(), model.parameters(), strict=True):
        left, right = again.state[p], optimizer.state[q]
        assert torch.equal(whole(left["state1"]), whole(right["state1"]))


def test_blocks_follow_from_columns_to_rows(pool, backend, tmp_path):
    pool(2, backend, run_replaced, str(tmp_path))


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(256, 500)
        self.down = nn.Linear(512, 256)

    def set_gradients(self, number):
        draw = torch.Generator().manual_seed(number)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=draw).to(device_type())
            if isinstance(p, DTensor):
                whole_grad = p.grad
                p.grad = None
                p.grad = distribute_tensor(whole_grad, p.device_mesh, p.placements)


def run_grid(folder):
    """FSDP2 around tensor parallelism on two times two processes, then FSDP2 on less."""
    model, alone = Grid().to(device_type()), Grid().to(device_type())
    if torch.distributed.get_world_size() == 4:
        grid = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("rows", "model"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        fully_shard(parallelize_module(model, grid["model"], plan), mesh=grid["rows"])
    else:
        fully_shard(model, mesh=mesh())
    optimizer, single = make("Adam8bit", model), make("Adam8bit", alone)
    train_parallel(alone, single, range(3))
    if torch.distributed.get_world_size() == 4:
        train_parallel(model, optimizer, range(3))
        save(model, optimizer, folder)
    else:
        load(model, optimizer, folder)
    train_parallel(model, optimizer, range(3, 5))
    train_parallel(alone, single, range(3, 5))
    assert_same(model, alone, [name for name, _ in alone.named_parameters()])


def test_fully_shard_around_tensor_parallelism(pool, backend, tmp_path):
    if backend == "nccl" and torch.cuda.device_count() < 4:
        pytest.skip("needs four GPUs")
    pool(4, backend, run_grid, str(tmp_path))
    pool(2, backend, run_grid, str(tmp_path))
