# SPDX-License-Identifier: MIT
"""Paged memory: values, attributes, lifetime, errors, and what stands in for it elsewhere."""

import copy
import io
import os
import subprocess
import sys
import types

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes import paged

CPU = torch.device("cpu")


def saved_and_loaded(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, **options)


# ---- Where there is none ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_get_paged_on_the_cpu_gives_an_ordinary_tensor_of_zeros(shape, dtype):
    t = F.get_paged(*shape, dtype=dtype, device="cpu")
    assert type(t) is torch.Tensor and t.shape == shape and t.dtype == dtype and t.device == CPU
    assert torch.equal(t, torch.zeros(shape, dtype=dtype))
    assert not t.is_paged and not hasattr(t, "page_deviceid")
    F.prefetch_tensor(t)
    F.prefetch_tensor(t, to_cpu=True)


def test_default_of_get_paged_is_float32_on_the_accelerator_or_the_cpu():
    t = F.get_paged(2)
    assert t.dtype == torch.float32
    assert t.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["cpu", "meta", "xpu:0"])
def test_devices_without_paged_memory_say_why(device):
    device = torch.device(device)
    reason = paged.unavailable(device)
    assert reason and device.type in reason.lower()
    assert paged.describe(device) == f"plain memory ({reason})"
    assert paged.allocated_bytes(device) == 0


def test_a_missing_native_module_is_the_reason_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(paged._library, "gpu_module", lambda: (None, "not part of this build"))
    assert paged.unavailable(torch.device("cuda", 0)) == "not part of this build"


# ---- Attributes of old programs -----------------------------------------------------------------


def flagged(t):
    """A tensor with the attributes that old programs stored in it, past the properties."""
    t.__dict__.update(is_paged=True, page_deviceid=0)
    return t


COPIES = {
    "itself": lambda t: t,
    "saved": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "to": lambda t: t.to("cpu"),
    "clone": lambda t: t.clone(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "view": lambda t: t.view(-1),
}


@pytest.mark.parametrize("how", COPIES)
def test_attributes_are_never_set_on_ordinary_tensors(how):
    t = COPIES[how](flagged(torch.ones(10)))
    assert t.is_paged is False
    assert not hasattr(t, "page_deviceid")
    t.is_paged, t.page_deviceid = True, 0
    assert t.is_paged is False and not hasattr(t, "page_deviceid")
    assert torch.equal(t, torch.ones(10))


def test_attributes_of_tensors_without_memory():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(3, device="cuda")
    assert fake.is_paged is False
    assert torch.empty(3, device="meta").is_paged is False
    assert torch.eye(3).to_sparse().is_paged is False


# ---- The manager --------------------------------------------------------------------------------


def test_manager_is_one_and_not_constructed():
    manager = F.GlobalPageManager.get_instance()
    assert manager is F.GlobalPageManager.get_instance()
    with pytest.raises(RuntimeError, match="get_instance"):
        F.GlobalPageManager()


def test_manager_keeps_order_and_nothing_alive():
    manager = F.GlobalPageManager.__new__(F.GlobalPageManager)
    manager.initialize()
    tensors = [torch.zeros(1) for _ in range(4)]
    for t in (*tensors, tensors[1]):
        manager.paged_tensors.append(t)
    assert [t is known for t, known in zip(tensors, manager.paged_tensors, strict=True)] == [
        True
    ] * 4
    del t, tensors[2]
    assert len(manager.paged_tensors) == 3 and manager.paged_tensors[2] is tensors[2]
    manager.paged_tensors.append(torch.zeros(1))
    assert len(manager.paged_tensors) == 3
    manager.prefetch_all()
    manager.prefetch_all(to_cpu=True)


# ---- Elementwise functions ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_elementwise_functions(device, dtype):
    a = F.get_paged(3, 5, dtype=dtype, device=device)
    counted = torch.arange(15).view(3, 5).to(dtype)
    F.fill(a, 7)
    assert torch.equal(a.cpu(), torch.full((3, 5), 7, dtype=dtype))
    F.arange(a)
    assert torch.equal(a.cpu(), counted)
    b = F.get_paged(3, 5, dtype=dtype, device=device)
    F.elementwise_func("fill", b, None, 3)
    F._mul(a, b)
    assert torch.equal(a.cpu(), counted * 3)
    column = F.get_paged(3, 5, dtype=dtype, device=device).t()
    F.arange(column)
    assert torch.equal(column.cpu(), torch.arange(15).view(5, 3).to(dtype))


def test_elementwise_functions_name_what_is_wrong():
    a = torch.zeros(2)
    with pytest.raises(ValueError, match=r"func_name must be one of .*'add'"):
        F.elementwise_func("add", a, None, 0)
    with pytest.raises(ValueError, match="B must be a tensor"):
        F.elementwise_func("_mul", a, None, 0)


# ---- Room on the host ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_room_in_a_container_counts_files_as_free(tmp_path, version):
    names = [("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")]
    limit, used = names[version - 1]
    prefix = "total_" if version == 1 else ""
    assert paged._room_in_container(tmp_path) is None
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / used).write_text("700\n")
    assert paged._room_in_container(tmp_path) == 300
    stat = f"anon 500\n{prefix}active_file 50\n{prefix}inactive_file 20\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert paged._room_in_container(tmp_path) == 370
    (tmp_path / used).write_text("5000\n")
    assert paged._room_in_container(tmp_path) == 0
    (tmp_path / limit).write_text("max\n")
    assert paged._room_in_container(tmp_path) is None


def test_room_on_the_host_is_real():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < paged._available_host_bytes() <= pages


# ---- On a device --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1000, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16, torch.int64])
def test_paged_tensor_is_an_ordinary_tensor_of_its_device(paged_device, shape, dtype):
    t = F.get_paged(*shape, dtype=dtype, device=paged_device)
    assert (
        type(t) is torch.Tensor
        and t.shape == shape
        and t.dtype == dtype
        and t.device == paged_device
    )
    assert t.is_contiguous() and t._base is None
    assert t.is_paged is True and t.page_deviceid == paged_device.index
    assert torch.equal(t.cpu(), torch.zeros(shape, dtype=dtype))
    t += 3
    assert torch.equal((t * 2).cpu(), torch.full(shape, 6, dtype=dtype))
    assert not (t * 2).is_paged


def test_paged_tensor_works_with_other_tensors(paged_device):
    a = F.get_paged(64, 64, device=paged_device).normal_()
    b = torch.randn(64, 64, device=paged_device)
    assert torch.equal(a @ b, a.clone() @ b)
    assert a.view(-1).is_paged and a[3:].is_paged and a.t().is_paged and a.detach().is_paged
    assert torch.nn.Parameter(a).is_paged


def test_device_without_index_is_the_current_one(paged_device):
    assert F.get_paged(3, device="cuda").device == paged_device


COPIES_ON_DEVICE = {
    "saved": saved_and_loaded,
    "saved to cpu": lambda t: saved_and_loaded(t, map_location="cpu"),
    "deepcopy": copy.deepcopy,
    "clone": lambda t: t.clone(),
    "cpu": lambda t: t.cpu(),
    "dtype": lambda t: t.to(torch.float64),
    "copied": lambda t: t.to(t.device, copy=True),
    "stored": lambda t: t.contiguous() + 0,
}


@pytest.mark.parametrize("how", COPIES_ON_DEVICE)
def test_copies_of_paged_tensors_are_ordinary(paged_device, how):
    t = F.get_paged(1000, device=paged_device)
    F.arange(t)
    before = paged.allocated_bytes(paged_device)
    new = COPIES_ON_DEVICE[how](flagged(t))
    assert not new.is_paged and not hasattr(new, "page_deviceid")
    assert paged.allocated_bytes(paged_device) == before
    assert torch.equal(new.cpu().float(), torch.arange(1000.0))
    assert t.is_paged and t.to(paged_device) is t


@pytest.mark.parametrize("side_stream", [False, True])
def test_values_survive_prefetch_both_ways(paged_device, side_stream):
    values = torch.randn(1 << 20)
    with torch.cuda.stream(torch.cuda.Stream() if side_stream else None):
        t = F.get_paged(1 << 20, device=paged_device).copy_(values)
        for to_cpu in (True, False, True, True, False):
            F.prefetch_tensor(t, to_cpu)
            assert torch.equal(t.cpu(), values)
            t += 1
            values += 1
        F.prefetch_tensor(t, to_cpu=True)
        assert torch.equal((t + 1).cpu(), values + 1)


def test_prefetch_all_moves_everything(paged_device):
    tensors = [F.get_paged(1 << 18, device=paged_device).fill_(i) for i in range(3)]
    manager = F.GlobalPageManager.get_instance()
    assert all(any(known is t for known in manager.paged_tensors) for t in tensors)
    for to_cpu in (True, False):
        manager.prefetch_all(to_cpu)
        for i, t in enumerate(tensors):
            assert bool((t == i).all())


def test_prefetch_of_an_ordinary_tensor_is_an_error_on_a_device(paged_device):
    with pytest.raises(ValueError, match="prefetch_tensor: A must be in paged memory"):
        F.prefetch_tensor(torch.zeros(3, device=paged_device))


def test_memory_is_freed_with_the_last_reference(paged_device):
    before = paged.allocated_bytes(paged_device)
    t = F.get_paged(1000, 1000, device=paged_device)
    pages = paged.pages_of([t, torch.zeros(1, device=paged_device), t[2:]])
    assert len(pages) == 2 and pages[0] == pages[1]
    assert paged.allocated_bytes(paged_device) == before + 4_000_000
    view = t[5]
    del t
    assert paged.allocated_bytes(paged_device) == before + 4_000_000 and view.is_paged
    del view
    assert paged.allocated_bytes(paged_device) == before
    paged.prefetch_pages(pages, paged_device)  # of an allocation that is gone: nothing


def test_memory_is_not_freed_under_a_running_kernel(paged_device):
    out = torch.zeros(1 << 20, device=paged_device)
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        t = F.get_paged(1 << 20, device=paged_device).fill_(5)
        out.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            out.copy_(t)
        del t
        other = F.get_paged(1 << 20, device=paged_device)  # might get the same place
        torch.cuda.synchronize()
        assert bool((out == 5).all()) and not bool(other.any())


def test_tensor_may_die_and_be_prefetched_while_a_graph_is_captured(paged_device):
    before = paged.allocated_bytes(paged_device)
    kept = F.get_paged(1 << 18, device=paged_device).fill_(2)
    dying = F.get_paged(1 << 18, device=paged_device)
    out = torch.zeros(1 << 18, device=paged_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.prefetch_tensor(kept)
        out.add_(kept)
        del dying
        out.add_(kept)
    graph.replay()
    graph.replay()
    assert bool((out == 8).all())
    del kept
    F.get_paged(1, device=paged_device)  # frees what the capture may have put off
    assert paged.allocated_bytes(paged_device) == before


@pytest.mark.parametrize("shape", [(1 << 58,), (1 << 40, 1 << 40)])
def test_too_much_is_an_out_of_memory_error(paged_device, shape):
    before = paged.allocated_bytes(paged_device)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"get_paged: CUDA out of memory.*GiB"):
        F.get_paged(*shape, device=paged_device)
    assert paged.allocated_bytes(paged_device) == before
    assert F.get_paged(10, device=paged_device).sum() == 0


def test_refusal_of_the_driver_is_an_out_of_memory_error(paged_device, monkeypatch):
    before = paged.allocated_bytes(paged_device)
    module, reason = paged._library.gpu_module()
    refusing = types.SimpleNamespace(**vars(module))
    refusing.allocate_managed = lambda bytes, device: None
    monkeypatch.setattr(paged._library, "gpu_module", lambda: (refusing, reason))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        F.get_paged(1000, device=paged_device)
    assert paged.allocated_bytes(paged_device) == before


def test_negative_size_is_an_error(paged_device):
    with pytest.raises(ValueError, match="get_paged: shape must be zero or positive"):
        F.get_paged(3, -1, device=paged_device)


def test_process_ends_with_paged_tensors_alive(paged_device):
    code = """
import torch, bitsandbytes.functional as F
kept = F.get_paged(1000, 1000, device="cuda").normal_()
torch.keep = F.get_paged(10, device="cuda")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_description_on_a_device(paged_device):
    assert paged.describe(paged_device).startswith("managed memory, ")
