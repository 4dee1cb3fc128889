# SPDX-License-Identifier: MIT
"""Optimizers under PyTorch's distribution, on several processes."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import bitsandbytes as bnb
from bitsandbytes.optim import sharding
from reference import codes as reference

OPTIMIZERS = ["Adam8bit", "AdamW8bit", "Lion8bit", "Adam", "AdEMAMix8bit"]
# Rows of `whole` and `single` are blocks of 256, those of the others are not.
SHAPES = {
    "whole": (11, 512),
    "odd": (37, 130),
    "vector": (5000,),
    "single": (1, 4608),  # only one process has anything of it
    "image": (9, 4, 8, 16),
    "small": (7, 9),
}
WHOLE = ("whole", "single", "image", "small")


@pytest.fixture(scope="module")
def pool():
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(params=["gloo", "nccl"])
def backend(request):
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return request.param


def need_devices(backend, count):
    if backend == "nccl" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")


# ---- What the processes run ---------------------------------------------------------------------


def device_type():
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw)))
        self.to(device_type())

    def forward(self, number):
        # Gradients are the same on every process and have few bits: their average is exact.
        slopes = [(p.detach() * (1.0 + number % 5) + number).sin() for p in self.parameters()]
        pairs = zip(self.parameters(), slopes, strict=True)
        return sum((p * slope.bfloat16().float()).sum() for p, slope in pairs)


def mesh():
    return init_device_mesh(device_type(), (torch.distributed.get_world_size(),))


def sharded_model():
    return fully_shard(Model(), mesh=mesh())


def make(name, model, **settings):
    return getattr(bnb.optim, name)(model.parameters(), lr=1e-2, **settings)


def train(model, optimizer, numbers):
    for number in numbers:
        model(number).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu()


def assert_same(model, expected, exact):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p, q = whole(p), whole(q)
        if name in exact:
            assert torch.equal(p, q), name
        else:
            # Other blocks, other roundings of states; a wrong step moves everything by 1e-2.
            far = (p - q).abs() > 2e-3
            assert far.float().mean() < 0.02, (name, far.float().mean())


def exact_names(name):
    return WHOLE if name.endswith("8bit") else tuple(SHAPES)


def run_training(name):
    model, alone = sharded_model(), Model()
    train(model, make(name, model), range(5))
    train(alone, make(name, alone), range(5))
    assert_same(model, alone, exact_names(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_one_process(pool, backend, name):
    pool(2, backend, run_training, name)


# ---- torch.distributed.checkpoint ---------------------------------------------------------------


def save(model, optimizer, folder, **options):
    options = StateDictOptions(**options)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(model, optimizer, folder, **options):
    options = StateDictOptions(**options)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


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

# Shape, dimension that is sharded (None: replicas), and whether states are written by blocks.
PARALLEL = {
    "columns": ((6, 1024), 1, True),
    "narrow": ((6, 768), 1, False),
    "channels": ((4, 6, 16, 16), 1, True),
    "last": ((8, 4, 256), 2, False),
    "replica": ((20, 256), None, True),
    "number": ((), None, None),
}


class Parallel(nn.Module):
    def __init__(self, places):
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        for name, (shape, dim, _) in PARALLEL.items():
            value = torch.randn(shape, generator=draw).to(device_type())
            if places is not None:
                placement = Replicate()
                if dim is not None:
                    placement = Shard(dim if places == "own" else 0)
                value = distribute_tensor(value, mesh(), [placement])
            self.register_parameter(name, nn.Parameter(value))

    def set_gradients(self, number):
        draw = torch.Generator().manual_seed(number)
        for p in self.parameters():
            grad = torch.randn(p.shape, generator=draw).to(device_type())
            if isinstance(p, DTensor):
                if number % 2:
                    # Not where the parameter lies: a sum still to be made.
                    parts = torch.distributed.get_world_size()
                    grad = DTensor.from_local(grad / parts, p.device_mesh, [Partial()])
                else:
                    # Not as the parameter lies in memory.
                    grad = distribute_tensor(grad, p.device_mesh, p.placements)
                    turned = grad.to_local().mT.contiguous().mT if p.dim() else grad.to_local()
                    strides = {"shape": grad.shape, "stride": grad.stride()}
                    grad = DTensor.from_local(turned, p.device_mesh, p.placements, **strides)
            p.grad = grad


def train_parallel(model, optimizer, numbers):
    for number in numbers:
        model.set_gradients(number)
        optimizer.step()
        optimizer.zero_grad()


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
    need_devices(backend, 4)
    pool(4, backend, run_grid, str(tmp_path))
    pool(2, backend, run_grid, str(tmp_path))


# ---- Settings that look at whole tensors ---------------------------------------------------------


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


def run_max_unorm():
    model = sharded_model()
    optimizer = make("LAMB8bit", model)
    model(0).backward()
    with pytest.raises(ValueError, match="max_unorm must be 0 for parameters split"):
        optimizer.step()
    assert_same(model, Model(), tuple(SHAPES))
    replicas = Parallel("own")
    kept = [p for p in replicas.parameters() if p.placements == (Replicate(),)]
    replicas.set_gradients(0)
    bnb.optim.LAMB8bit(kept, lr=1e-2).step()


def test_bounds_on_whole_updates_are_refused_for_parts(pool, backend):
    pool(2, backend, run_max_unorm)


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


def run_without_synchronisation():
    model = sharded_model()
    optimizer = make("Adam8bit", model)
    train(model, optimizer, range(2))
    model(2).backward()
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")


def test_step_does_not_synchronise(pool, backend):
    if backend == "gloo":
        pytest.skip("needs two GPUs")
    pool(2, backend, run_without_synchronisation)


# ---- FullyShardedDataParallel, DistributedDataParallel ------------------------------------------


def flat_model(use_orig_params):
    device = torch.device("cpu")
    if device_type() == "cuda":
        device = torch.device("cuda", torch.distributed.get_rank())
    model = FSDP(Model(), use_orig_params=use_orig_params, device_id=device)
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
    for name, settings in (("LAMB", {}), ("Adam", {"percentile_clipping": 5})):
        with pytest.raises(ValueError, match=r"step: .* for parameters"):
            make(name, model, **settings).step()


def test_bounds_on_whole_tensors_are_refused_for_flattened_parameters(pool, backend):
    pool(2, backend, run_flat_bounds)


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
