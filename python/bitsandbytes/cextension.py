# SPDX-License-Identifier: MIT
"""What programs ask of the public package's native library.

Compat: this package offers torch ops instead of C symbols, so `lib` has none. Reading one gives a
function that says so when it is called, since programs collect symbols when they are imported.
"""

from collections.abc import Callable
from typing import NoReturn

import torch

from . import _library

__all__ = ["HIP_ENVIRONMENT", "NativeLibrary", "lib"]  # and BNB_BACKEND, ROCM_GPU_ARCH, see below

HIP_ENVIRONMENT = torch.version.hip is not None


class NativeLibrary:
    """Stands for the public package's library: every symbol exists, and raises when called."""

    @property
    def compiled_with_cuda(self) -> bool:
        """Whether ops with GPU kernels are loaded."""
        return _library.libraries["_cuda"].loaded

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(f"'NativeLibrary' object has no attribute '{name}'")

        def call(*args, **kwargs) -> NoReturn:
            raise RuntimeError(
                f"lib.{name}: this package has no C symbols; call bitsandbytes.functional or "
                "torch.ops.bitsandbytes instead, and see python -m bitsandbytes for what is loaded"
            )

        call.__name__ = name
        return call

    def __getitem__(self, name: str) -> Callable[..., NoReturn]:
        return getattr(self, name)


lib = NativeLibrary()


def __getattr__(name: str) -> str:
    # Asked of torch when somebody wants to know: the answer may start the device.
    if name == "BNB_BACKEND":
        if HIP_ENVIRONMENT:
            return "ROCm"
        if torch.cuda.is_available():
            return "CUDA"
        return "XPU" if torch.xpu.is_available() else "CPU"
    if name == "ROCM_GPU_ARCH":
        if not HIP_ENVIRONMENT or not torch.cuda.is_available():
            return "unknown"
        return torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
