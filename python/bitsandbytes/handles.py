# SPDX-License-Identifier: MIT
"""Pointers, streams and handles, for programs that call native code of their own with tensors."""

import contextlib
import ctypes
from typing import ClassVar

import torch
from torch import Tensor

__all__ = [
    "FIRST_CUDA_DEVICE",
    "CUBLAS_Context",
    "_cuda_device_of",
    "_get_tensor_stream",
    "dtype2bytes",
    "get_ptr",
    "pipeline_test",
    "post_call",
    "pre_call",
]

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)

dtype2bytes = {
    torch.float32: 4,
    torch.float16: 2,
    torch.bfloat16: 2,
    torch.uint8: 1,
    torch.int8: 1,
}


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """Returns the address of a tensor's first element, or None for None."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def _get_tensor_stream(tensor: Tensor) -> ctypes.c_void_p:
    """Returns the raw current stream of a tensor's device.

    For a CPU tensor it is that of the current accelerator; null where there is none.
    """
    device = tensor.device
    if device.type == "cpu":
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is None:
            return ctypes.c_void_p(None)
    if device.type == "cuda":
        return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    if device.type == "xpu":
        return ctypes.c_void_p(torch.xpu.current_stream(device).sycl_queue)
    raise ValueError(f"_get_tensor_stream: tensor must be on cpu, cuda or xpu, got {tensor.device}")


def _cuda_device_of(a: Tensor) -> contextlib.AbstractContextManager:
    """Returns a context in which the device of `a` is current; an empty one for a single GPU."""
    if torch.cuda.device_count() > 1:
        return torch.cuda.device_of(a)
    return contextlib.nullcontext()


def pre_call(device: torch.device) -> torch.device:
    """Makes a CUDA device current and returns the one that was, for :func:`post_call`."""
    before = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return before


def post_call(prev_device: torch.device) -> None:
    """Makes the device current again that :func:`pre_call` returned."""
    torch.cuda.set_device(prev_device)


def pipeline_test(A: Tensor, batch_size: int) -> Tensor:
    """Returns a copy of `A`. The size of the batches of the copy is without effect."""
    return A.clone()


class CUBLAS_Context:
    """The cuBLAS or hipBLAS handles of torch, one per device.

    Example:
        >>> CUBLAS_Context.get_instance() is CUBLAS_Context.get_instance()
        True
    """

    _instance: ClassVar["CUBLAS_Context | None"] = None
    context: dict[int, ctypes.c_void_p]

    def __init__(self) -> None:
        raise RuntimeError("CUBLAS_Context: call get_instance() instead of the class")

    @classmethod
    def get_instance(cls) -> "CUBLAS_Context":
        """Returns the one object of this class."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.context = {}
        return cls._instance

    def get_context(self, device: torch.device) -> ctypes.c_void_p:
        """Returns the handle of a CUDA or ROCm device, which works on its current stream."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self.context:
            with torch.cuda.device(index):
                self.context[index] = ctypes.c_void_p(torch.cuda.current_blas_handle())
        return self.context[index]
