# SPDX-License-Identifier: MIT
"""Paged memory: tensors of a GPU whose pages move to the host when the GPU runs out of memory.

It is the managed memory of CUDA and HIP. Devices without it get ordinary tensors;
:func:`unavailable` says why, and so does ``python -m bitsandbytes``.
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import _library
from ._checks import check

__all__ = [
    "GlobalPageManager",
    "allocated_bytes",
    "arange",
    "describe",
    "elementwise_func",
    "fill",
    "get_paged",
    "is_paged",
    "pages_of",
    "prefetch_pages",
    "prefetch_tensor",
    "unavailable",
]

# Share of the host's available memory that paged memory may take.
HOST_SHARE = 0.9


# ---- What a device offers -----------------------------------------------------------------------


def unavailable(device: torch.device) -> str | None:
    """Returns why there is no paged memory for a device, or None where there is."""
    if device.type == "cpu":
        return "tensors of the CPU lie in the host's memory anyway"
    if device.type != "cuda":
        return f"{device.type} devices have none here"
    if not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device"
    module, reason = _library.gpu_module()
    if module is None:
        return reason
    if not module.managed_support(_index(device)).memory:
        return "this device has no managed memory"
    return None


def describe(device: torch.device) -> str:
    """Returns what paged optimizers use on a device, for the diagnostics."""
    reason = unavailable(device)
    if reason is not None:
        return f"plain memory ({reason})"
    module, _ = _library.gpu_module()
    if not module.managed_support(_index(device)).prefetch:
        return "managed memory, without prefetch (this device and the host cannot share its pages)"
    return "managed memory, prefetched before each step"


def allocated_bytes(device: torch.device) -> int:
    """Returns how many bytes of paged memory are allocated for a device."""
    if unavailable(device) is not None:
        return 0
    module, _ = _library.gpu_module()
    return module.managed_bytes(_index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# ---- Allocation ---------------------------------------------------------------------------------


def get_paged(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Returns a tensor of zeros in paged memory.

    It is an ordinary tensor of its device: every operation takes it, and copies of it, also those
    of ``copy.deepcopy`` and ``torch.save``, lie in ordinary memory. Its memory is freed with its
    last reference. On a device without paged memory (:func:`unavailable`), its own memory is
    ordinary as well.

    Args:
        shape: Size of each dimension.
        dtype: Any dtype of torch.
        device: The device that works with the tensor; by default the current CUDA device, or the
            CPU where there is none.

    Returns:
        The tensor, contiguous.

    Raises:
        torch.cuda.OutOfMemoryError: Device and host together have no room for it.

    Example:
        >>> state = get_paged(1024, 1024, dtype=torch.uint8)
        >>> prefetch_tensor(state)
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if unavailable(device) is not None:
        return torch.zeros(shape, dtype=dtype, device=device)
    device = torch.device(device.type, _index(device))
    check(all(size >= 0 for size in shape), "get_paged", "shape", "zero or positive", list(shape))
    nbytes = math.prod(shape) * dtype.itemsize
    storage = _allocate(nbytes, device)
    tensor = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape)
    manager = GlobalPageManager.get_instance()
    manager.paged_tensors.append(tensor)
    # Pages are placed by their first write: on the device, before anything else.
    prefetch_tensor(tensor)
    return tensor.zero_()


def _allocate(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    on_device, _ = torch.cuda.mem_get_info(device)
    on_host = 0 if nbytes <= on_device else int(HOST_SHARE * _available_host_bytes())
    capsule = None
    if nbytes <= on_device + on_host:
        module, _ = _library.gpu_module()
        capsule = module.allocate_managed(nbytes, device.index)
    if capsule is None:
        gib = 2**30
        raise torch.cuda.OutOfMemoryError(
            f"get_paged: CUDA out of memory: tried to allocate {nbytes / gib:.2f} GiB of paged "
            f"memory, but {device} has {on_device / gib:.2f} GiB free and the host "
            f"{_available_host_bytes() / gib:.2f} GiB; 8-bit states need a quarter of 32-bit "
            "ones, and torch.cuda.empty_cache() gives back what torch holds in reserve"
        )
    return torch.from_dlpack(capsule).untyped_storage()


def _available_host_bytes() -> int:
    """Memory that this process can still get from the host without anything being killed."""
    available = 1024 * _numbers(Path("/proc/meminfo")).get("MemAvailable:", 0)
    for room in map(_room_in_container, (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))):
        available = available if room is None else min(available, room)
    return available


def _room_in_container(group: Path) -> int | None:
    """What the memory limit of a control group leaves; None where it has no limit."""
    # Names of version 2 of control groups, and of version 1.
    for limit, used, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            room = int((group / limit).read_text()) - int((group / used).read_text())
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
        # Copies of files count as used, but can be dropped.
        stat = _numbers(group / "memory.stat")
        return max(0, room + sum(stat.get(f"{prefix}{k}_file", 0) for k in ("active", "inactive")))
    return None


def _numbers(path: Path) -> dict[str, int]:
    """Reads lines of a name and a number."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


# ---- Which tensors are paged --------------------------------------------------------------------


def is_paged(tensor: Tensor) -> bool:
    """Returns whether the elements of a tensor lie in paged memory."""
    return _start(tensor) is not None


def _start(tensor: Tensor) -> int | None:
    """Returns the address of the allocation behind a paged tensor, and None for any other."""
    if tensor.device.type != "cuda":
        return None
    module, _ = _library.gpu_module()
    if module is None:
        return None
    try:
        start = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # fake, sparse and other tensors without memory
        return None
    return start if module.is_managed(start) else None


def _page_deviceid(tensor: Tensor) -> int:
    if not is_paged(tensor):
        raise AttributeError("page_deviceid: the tensor is not in paged memory")
    return tensor.device.index


def _set_nothing(tensor: Tensor, value: object) -> None:
    """Takes what checkpoints of old programs say of themselves; where a tensor lies decides."""


# Attributes of tensors that old programs read. Written into a tensor they would be copied, saved
# and loaded along with it, onto tensors in ordinary memory; so they are computed.
Tensor.is_paged = property(is_paged, _set_nothing, doc="Whether this tensor is in paged memory.")
Tensor.page_deviceid = property(
    _page_deviceid, _set_nothing, doc="Index of the device that this paged tensor is for."
)


class _WeakTensors(Sequence):
    """A list of tensors that does not keep them alive."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Tensor]] = {}  # by id, in order of insertion

    def append(self, tensor: Tensor) -> None:
        """Adds a tensor at the end, unless it is there."""
        known = self._references.get(id(tensor))
        if known is None or known() is not tensor:
            self._references.pop(id(tensor), None)  # of a tensor that is gone
            self._references[id(tensor)] = weakref.ref(tensor)

    def _alive(self) -> list[Tensor]:
        pairs = [(key, reference()) for key, reference in self._references.items()]
        for key, tensor in pairs:
            if tensor is None:
                del self._references[key]
        return [tensor for _, tensor in pairs if tensor is not None]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._alive())

    def __getitem__(self, index):
        return self._alive()[index]

    def __len__(self) -> int:
        return len(self._alive())


class GlobalPageManager:
    """The paged tensors of this process. Get the one instance with :meth:`get_instance`.

    Attributes:
        paged_tensors: Those that are alive, oldest first. They are not kept alive.
    """

    _instance: "GlobalPageManager | None" = None

    def __init__(self):
        raise RuntimeError("GlobalPageManager: call get_instance() instead")

    @classmethod
    def get_instance(cls) -> "GlobalPageManager":
        """Returns the instance of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forgets every tensor."""
        self.paged_tensors = _WeakTensors()

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Moves every tensor to its device, the newest first, or to the host.

        Args:
            to_cpu: Move them to the host.
        """
        newest_first = list(reversed(self.paged_tensors))
        for device in dict.fromkeys(tensor.device for tensor in newest_first):
            prefetch_pages(
                pages_of(tensor for tensor in newest_first if tensor.device == device),
                device,
                to_cpu,
            )


# ---- Prefetch -----------------------------------------------------------------------------------

AMPLE_BYTES = 2**28
_moves_to_host = 0  # counts prefetches to the host


def pages_of(tensors: Iterable[Tensor]) -> list[int]:
    """Returns the allocations of those tensors that are paged, for :func:`prefetch_pages`."""
    return [start for start in map(_start, tensors) if start is not None]


def prefetch_pages(pages: list[int], device: torch.device, to_cpu: bool = False) -> None:
    """Moves allocations in one native call; see :func:`prefetch_tensor`.

    Args:
        pages: What :func:`pages_of` returned. Allocations that were freed since are passed over.
        device: Their device, whose current stream is meant.
        to_cpu: Move them to the host.
    """
    if pages:
        global _moves_to_host
        _moves_to_host += to_cpu
        module, _ = _library.gpu_module()
        module.prefetch_managed(pages, to_cpu, torch.cuda.current_stream(device).cuda_stream)


def has_ample_memory(device: torch.device) -> bool:
    """Whether so much memory of `device` is free that no page had to make room."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= AMPLE_BYTES


class Residency:
    """Whether pages that were brought to a device are still there.

    A prefetch of pages that have not moved costs about 10 us each. Nobody is asked for each page:
    pages leave a device when someone moves them, or when its memory is full.
    """

    def __init__(self):
        self._moves_when_brought: int | None = None

    def may_be_lost(self, device: torch.device) -> bool:
        """Returns whether to prefetch the pages now; takes it that this is then done."""
        moves = _moves_to_host if has_ample_memory(device) else None
        kept = moves is not None and moves == self._moves_when_brought
        self._moves_when_brought = moves
        return not kept


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Moves a paged tensor to its device, or to the host, in the order of the current stream.

    It is a hint that saves page faults: results do not depend on it. Nothing happens while a CUDA
    graph is captured, and on devices that cannot prefetch or have no paged memory.

    Args:
        A: A tensor from :func:`get_paged`, of any shape and dtype.
        to_cpu: Move it to the host.

    Raises:
        ValueError: `A` is an ordinary tensor of a device that has paged memory.

    Example:
        >>> state = get_paged(1024)
        >>> prefetch_tensor(state, to_cpu=True)
    """
    pages = pages_of([A])
    ordinary = not pages and unavailable(A.device) is None
    check(not ordinary, "prefetch_tensor", "A", "in paged memory", "an ordinary tensor")
    prefetch_pages(pages, A.device, to_cpu)


# ---- Elementwise functions of old programs ------------------------------------------------------


def fill(A: Tensor, value: float, device: object = None, prefetch: bool = True) -> None:
    """Sets every element of a tensor.

    Args:
        A: Any tensor.
        value: The value, converted to the dtype of `A`.
        device: Without effect.
        prefetch: Move a paged tensor to its device first.
    """
    elementwise_func("fill", A, None, value, prefetch)


def arange(A: Tensor, device: object = None) -> None:
    """Sets the elements of a tensor to 0, 1, 2, ... in row-major order.

    Args:
        A: Any tensor of numbers.
        device: Without effect.
    """
    elementwise_func("arange", A, None, 0)


def _mul(A: Tensor, B: Tensor, device: object = None) -> None:
    """Multiplies a tensor by another in place.

    Args:
        A: Any tensor of numbers.
        B: A tensor that broadcasts to the shape of `A`, on its device.
        device: Without effect.
    """
    elementwise_func("_mul", A, B, 0)


@torch.no_grad()
def elementwise_func(
    func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True
) -> None:
    """Writes a simple function into a tensor.

    Args:
        func_name: ``"fill"`` (value), ``"arange"`` (0, 1, 2 ...) or ``"_mul"`` (A * B).
        A: The tensor; any shape and dtype.
        B: Second factor of ``"_mul"``.
        value: What ``"fill"`` writes.
        prefetch: Move paged tensors to their device first.

    Raises:
        ValueError: Another name, or ``"_mul"`` without `B`.
    """
    names = ("fill", "arange", "_mul")
    check(func_name in names, "elementwise_func", "func_name", f"one of {names}", repr(func_name))
    check(func_name != "_mul" or B is not None, "elementwise_func", "B", "a tensor", B)
    if prefetch:
        prefetch_pages(pages_of(t for t in (A, B) if t is not None), A.device)
    if func_name == "fill":
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), device=A.device).view(A.shape))
    else:
        A.mul_(B)
