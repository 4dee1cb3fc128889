# SPDX-License-Identifier: MIT
"""Paged optimizers: which states are paged, prefetch before steps, checkpoints, one warning."""

import copy
import gc
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import paged
from bitsandbytes.optim import engine

LARGE = 100_000  # elements from which on states are paged
PAGED = sorted(name for name in bnb.optim.__all__ if name.startswith("Paged"))


def parameters(device, *sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, generator=generator).to(device)) for n in sizes]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        grads = parameters("cpu", *(p.numel() for p in params), seed=step)
        for grad, p in zip(grads, params, strict=True):
            p.grad = grad.detach().to(p.device)
        optimizer.step()


def saved(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return buffer.getvalue()


def states_of(optimizer, p):
    return [optimizer.state[p][key] for key in ("state1", "state2") if key in optimizer.state[p]]


def test_paged_classes_are_all_there():
    stems = ("Adam", "AdamW", "AdEMAMix", "Lion")
    assert PAGED == sorted(f"Paged{stem}{bits}" for stem in stems for bits in ("", "8bit", "32bit"))


# ---- Without paged memory -----------------------------------------------------------------------


def taking_is_paged():
    for name in bnb.optim.__all__:
        cls = getattr(bnb.optim, name)
        if inspect.isclass(cls) and "is_paged" in inspect.signature(cls).parameters:
            yield name


def warned(make, sizes):
    """Trains on the CPU; returns the optimizer, the parameters and the texts of warnings."""
    params = parameters("cpu", *sizes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make(params)
        train(optimizer, params, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, params, 2, first=2)
    return optimizer, params, [str(w.message) for w in caught if w.category is UserWarning]


@pytest.mark.parametrize("name", sorted({*PAGED, *taking_is_paged()}))
@pytest.mark.parametrize("sizes", [(10, 5000), (LARGE,)])
def test_on_the_cpu_every_paged_class_warns_once_and_steps_like_its_base(name, sizes):
    cls, base = getattr(bnb.optim, name), getattr(bnb.optim, name.removeprefix("Paged"))
    options = {} if name.startswith("Paged") else {"is_paged": True}
    optimizer, params, texts = warned(lambda p: cls(p, lr=1e-2, **options), sizes)
    assert optimizer.is_paged is True
    (text,) = texts
    assert text.startswith(f"{name}: states on cpu lie in plain memory")
    assert not any(state.is_paged for p in params for state in states_of(optimizer, p))
    other, expected, texts = warned(lambda p: base(p, lr=1e-2), sizes)
    assert other.is_paged is False and not texts
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)


def test_page_manager_is_at_hand():
    manager = bnb.functional.GlobalPageManager.get_instance()
    assert bnb.optim.Adam(parameters("cpu", 1)).page_mng is manager


def test_old_checkpoints_flag_nothing():
    params = parameters("cpu", LARGE)
    optimizer = bnb.optim.Adam8bit(params)
    train(optimizer, params, 1)
    for state in states_of(optimizer, params[0]):
        state.__dict__.update(is_paged=True, page_deviceid=0)  # as old programs stored it
    checkpoint = torch.load(io.BytesIO(saved(optimizer)), weights_only=True)
    for restored in (bnb.optim.Adam8bit(params), bnb.optim.PagedAdam8bit(params)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored.load_state_dict(checkpoint)
        for state in states_of(restored, params[0]):
            assert state.is_paged is False and not hasattr(state, "page_deviceid")
        train(restored, params, 1)


# ---- With paged memory, and with something that stands for it on the CPU ------------------------


class Stub:
    """Paged memory of the CPU that records what is prefetched."""

    def __init__(self):
        self.storages = {}
        self.prefetched = []

    def get_paged(self, *shape, dtype, device):
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.storages[tensor.data_ptr()] = tensor
        return tensor

    def is_paged(self, tensor):
        return tensor.data_ptr() in self.storages

    def pages_of(self, tensors):
        return [tensor.data_ptr() for tensor in tensors if self.is_paged(tensor)]

    def prefetch_pages(self, pages, device, to_cpu=False):
        self.prefetched.append(pages)


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    monkeypatch.setattr(paged, "unavailable", lambda device: None)
    for name in ("get_paged", "is_paged", "pages_of", "prefetch_pages"):
        monkeypatch.setattr(paged, name, getattr(stub, name))
    return stub


@pytest.mark.parametrize("name", PAGED)
def test_large_states_are_paged_and_nothing_else(stub, name):
    params = parameters("cpu", LARGE - 1, LARGE, 0)
    optimizer = getattr(bnb.optim, name)(params, lr=1e-2)
    train(optimizer, params, 1)
    for p in params:
        for key, value in optimizer.state[p].items():
            if torch.is_tensor(value):
                large = p.numel() >= LARGE and key in ("state1", "state2")
                assert stub.is_paged(value) == large, (p.numel(), key)


def test_each_step_prefetches_all_states_once(stub):
    params = parameters("cpu", LARGE, 10, LARGE + 1)
    optimizer = bnb.optim.PagedAdam32bit(params)
    train(optimizer, params, 1)
    expected = {state.data_ptr() for p in params for state in states_of(optimizer, p)}
    assert len(expected & stub.storages.keys()) == 4
    for _ in range(2):
        stub.prefetched.clear()
        train(optimizer, params, 1)
        (pages,) = stub.prefetched
        assert sorted(pages) == sorted(expected & stub.storages.keys())


def test_states_are_prefetched_again_when_they_may_have_moved(stub, monkeypatch):
    free = [paged.AMPLE_BYTES]
    monkeypatch.setattr(paged, "has_ample_memory", lambda device: free[0] >= paged.AMPLE_BYTES)
    params = parameters("cpu", LARGE)
    optimizer = bnb.optim.PagedAdam32bit(params)

    def prefetches():
        stub.prefetched.clear()
        train(optimizer, params, 1)
        return len(stub.prefetched)

    assert [prefetches() for _ in range(3)] == [1, 0, 0]
    monkeypatch.setattr(paged, "_moves_to_host", paged._moves_to_host + 1)
    assert [prefetches() for _ in range(2)] == [1, 0]
    free[0] -= 1
    assert [prefetches() for _ in range(2)] == [1, 1]
    free[0] += 1  # what was lost may still be
    assert [prefetches() for _ in range(3)] == [1, 0, 0]


def test_states_are_prefetched_in_runs_that_fit_a_device(stub, monkeypatch):
    monkeypatch.setattr(engine, "PAGED_RUN", 1_000_000)
    results = []
    for cls in (bnb.optim.PagedAdamW32bit, bnb.optim.AdamW32bit):
        params = parameters("cpu", *[LARGE] * 4)
        optimizer = cls(params)
        train(optimizer, params, 3)
        results.append(params)
    assert [len(pages) for pages in stub.prefetched] == [2, 2, 2, 2] * 3
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_unpaged_optimizers_prefetch_nothing(stub):
    params = parameters("cpu", LARGE)
    optimizer = bnb.optim.Adam(params)
    train(optimizer, params, 2)
    optimizer.prefetch_state(params[0])
    assert not stub.prefetched and not stub.storages


def test_protocol_of_single_parameters(stub):
    (p,) = params = parameters("cpu", LARGE)
    (q,) = others = parameters("cpu", LARGE)
    optimizer, other = bnb.optim.PagedLion8bit(params), bnb.optim.PagedLion8bit(others)
    optimizer.prefetch_state(p)  # before there is a state
    assert not any(stub.prefetched)
    group = optimizer.param_groups[0]
    for step in range(2):
        train(other, others, 1, first=step)
        stub.prefetched.clear()
        p.grad = q.grad
        with torch.no_grad():
            if step == 0:
                optimizer.init_state(group, p, 0, 0)
            optimizer.prefetch_state(p)
            optimizer.update_step(group, p, 0, 0)
        assert stub.prefetched == [[optimizer.state[p]["state1"].data_ptr()]]
    assert torch.equal(p, q)


def restored_by_loading(optimizer, params):
    new = type(optimizer)(params)
    new.load_state_dict(torch.load(io.BytesIO(saved(optimizer)), weights_only=True))
    return new


def restored_by_loading_live(optimizer, params):
    new = type(optimizer)(params)
    new.load_state_dict(optimizer.state_dict())
    return new


def restored_by_deepcopy(optimizer, params):
    new = copy.deepcopy(optimizer)
    new.param_groups[0]["params"][0].data = params[0].data
    params[:] = new.param_groups[0]["params"]
    return new


def restored_by_pickle(optimizer, params):
    new = pickle.loads(pickle.dumps(optimizer))
    new.param_groups[0]["params"][0].data = params[0].data
    params[:] = new.param_groups[0]["params"]
    return new


RESTORE = [
    restored_by_loading,
    restored_by_loading_live,
    restored_by_deepcopy,
    restored_by_pickle,
]


def resume(name, restore, device, is_paged):
    """Trains five steps with and without a break; both must agree, and states be paged after."""
    cls = getattr(bnb.optim, name)
    plain = getattr(bnb.optim, name.removeprefix("Paged"))
    params, straight = (parameters(device, LARGE + 300) for _ in range(2))
    optimizer, unbroken = cls(params, lr=1e-2), plain(straight, lr=1e-2)
    train(optimizer, params, 3)
    train(unbroken, straight, 5)
    old = states_of(optimizer, params[0])
    new = restore(optimizer, params)
    before = [state.clone() for state in old]
    train(new, params, 2, first=3)
    assert torch.equal(params[0], straight[0])
    for a, b in zip(states_of(new, params[0]), states_of(unbroken, straight[0]), strict=True):
        assert is_paged(a) and torch.equal(a, b)
    for a, b in zip(old, before, strict=True):
        assert torch.equal(a, b), "the restored optimizer wrote into the old one's states"


@pytest.mark.parametrize("restore", RESTORE)
@pytest.mark.parametrize("name", ["PagedAdam8bit", "PagedAdEMAMix8bit", "PagedLion32bit"])
def test_restored_states_are_paged_again(stub, name, restore):
    resume(name, restore, "cpu", stub.is_paged)


def test_loading_copies_states_of_other_parameters_too(stub):
    params = parameters("cpu", LARGE)
    optimizer = bnb.optim.PagedAdam(params)
    train(optimizer, params, 1)
    checkpoint = optimizer.state_dict()
    checkpoint["state"][7] = {"state1": torch.zeros(3), "foreign": torch.zeros(3)}
    optimizer.load_state_dict(checkpoint)
    optimizer.state[7]["state1"] += 1
    assert not checkpoint["state"][7]["state1"].any()


def test_move_to_device_false_leaves_states_where_they_are(stub):
    params = parameters("cpu", LARGE)
    optimizer = bnb.optim.PagedAdam(params)
    train(optimizer, params, 1)
    meta = optimizer.state_dict()
    inner = meta["state"][0]["__bnb_optimizer_quant_state__"]
    for key in ("state1", "state2"):
        inner[key] = inner[key].to("meta")
    new = bnb.optim.PagedAdam(params)
    new.load_state_dict(meta, move_to_device=False)
    assert all(state.is_meta for state in states_of(new, params[0]))


@pytest.fixture
def mesh():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_local_parts_of_distributed_states_are_paged(stub, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    start = torch.randn(400, 256)
    p = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    optimizer = bnb.optim.PagedAdEMAMix8bit([p])
    plain = nn.Parameter(start.clone())
    other = bnb.optim.AdEMAMix8bit([plain])

    def parts(optimizer):
        return [state.to_local() for state in states_of(optimizer, p)]

    for step in range(4):
        if step == 2:
            checkpoint = optimizer.state_dict()
            optimizer = bnb.optim.PagedAdEMAMix8bit([p])
            optimizer.load_state_dict(checkpoint)
        if step == 3:
            optimizer.__setstate__(copy.deepcopy(optimizer.__getstate__()))
            p = optimizer.param_groups[0]["params"][0]
        plain.grad = torch.randn(400, 256)
        p.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
        other.step()
        stub.prefetched.clear()
        optimizer.step()
        assert all(map(stub.is_paged, parts(optimizer)))
        assert stub.prefetched == [[part.data_ptr() for part in parts(optimizer)]]
    assert torch.equal(p.to_local(), plain)


# ---- On a device --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGED)
def test_steps_equal_the_unpaged_class_bit_for_bit(paged_device, name):
    sizes = (LARGE, 5000, 3 * LARGE + 77)
    results = []
    for cls in (getattr(bnb.optim, name), getattr(bnb.optim, name.removeprefix("Paged"))):
        params = parameters(paged_device, *sizes)
        optimizer = cls(params, lr=1e-2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(optimizer, params, 4)
        results.append((params, optimizer))
        for p in params:
            flags = [state.is_paged for state in states_of(optimizer, p)]
            assert all(flag == (optimizer.is_paged and p.numel() >= LARGE) for flag in flags)
            if name.startswith("PagedAdEMAMix"):
                assert optimizer.state[p]["state1"].shape == (2, *p.shape)
    (params, optimizer), (expected, other) = results
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
        for a, b in zip(states_of(optimizer, p), states_of(other, q), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("restore", RESTORE)
@pytest.mark.parametrize("name", PAGED)
def test_restored_states_are_paged_again_on_a_device(paged_device, name, restore):
    resume(name, restore, paged_device, paged.is_paged)


def test_states_that_went_to_the_host_come_back(paged_device):
    results = []
    for cls in (bnb.optim.PagedAdam8bit, bnb.optim.Adam8bit):
        params = parameters(paged_device, LARGE, LARGE)
        optimizer = cls(params, lr=1e-2)
        for step in range(3):
            train(optimizer, params, 1, first=step)
            optimizer.page_mng.prefetch_all(to_cpu=True)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_memory_is_freed_when_the_optimizer_dies(paged_device):
    before = paged.allocated_bytes(paged_device)
    params = parameters(paged_device, LARGE, LARGE)
    for _ in range(5):
        optimizer = bnb.optim.PagedAdam32bit(params)
        train(optimizer, params, 2)
        assert paged.allocated_bytes(paged_device) == before + 4 * 4 * LARGE
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, params, 1, first=2)
        del optimizer
        gc.collect()
        assert paged.allocated_bytes(paged_device) == before


def test_captured_steps_equal_eager_ones(paged_device):
    results = []
    for captured in (False, True):
        (p,) = params = parameters(paged_device, LARGE)
        optimizer = bnb.optim.PagedAdamW8bit(params, lr=1e-2)
        train(optimizer, params, 1)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            for _ in range(3):
                graph.replay()
        else:
            for _ in range(3):
                optimizer.step()
        assert optimizer.state[p]["step"] == 4
        results.append(p)
    assert torch.equal(*results)
