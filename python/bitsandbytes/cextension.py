# SPDX-License-Identifier: MIT
"""What programs ask of the public package's native library.

Compat: this package offers torch ops instead of C symbols. `lib` has those that programs call all
the same (csrc/bindings/c_symbols.cpp). Reading another gives a function that says what to do when
it is called, since programs collect symbols when they are imported.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from . import _library

# And BNB_BACKEND, ROCM_GPU_ARCH, see below.
__all__ = ["COMPILED_WITH_CUDA", "HIP_ENVIRONMENT", "NativeLibrary", "lib"]

HIP_ENVIRONMENT = torch.version.hip is not None


def _raise_sentence(sentence: bytes | None, function, arguments) -> None:
    if sentence is not None:
        raise RuntimeError(sentence.decode())


_SIZE, _POINTER = [ctypes.c_int], [ctypes.c_void_p]
_ARGUMENTS = {
    # code, codes, absmax, out; block size, elements; stream
    "cdequantize_blockwise": 4 * _POINTER + 2 * _SIZE + _POINTER,
    # m, n, k; a, codes, absmax, levels, out; lda, ldb, ldc, block size; stream
    "cgemm_4bit_inference_naive": 3 * _SIZE + 5 * _POINTER + 4 * _SIZE + _POINTER,
}
_SYMBOLS = {
    f"{function}_{dtype}{code}": arguments
    for function, arguments in _ARGUMENTS.items()
    for dtype in ("fp32", "fp16", "bf16")
    for code in (("", "_nf4", "_fp4") if function == "cdequantize_blockwise" else ("",))
}


@functools.cache
def _symbol(path: Path, name: str) -> Callable[..., None]:
    function = ctypes.CDLL(str(path))[name]
    function.argtypes = _SYMBOLS[name]
    function.restype = ctypes.c_char_p
    function.errcheck = _raise_sentence
    return function


class NativeLibrary:
    """Stands for the public package's library, whose C symbols programs call through ctypes.

    Reading a symbol never fails. Those that programs are known to call on a GPU work:
    ``cdequantize_blockwise_{fp32,fp16,bf16}``, with ``_nf4`` or ``_fp4`` behind it for 4 bits, and
    ``cgemm_4bit_inference_naive_{fp32,fp16,bf16}``. Their arguments are the public ones: pointers
    to memory of the current device, sizes, and the stream. What cannot be right is a
    ``RuntimeError``. All other symbols raise one when they are called.

    Example::

        lib.cdequantize_blockwise_bf16_nf4(
            None, get_ptr(packed), get_ptr(state.absmax), get_ptr(out),
            ctypes.c_int(state.blocksize), ctypes.c_int(out.numel()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
    """

    @property
    def compiled_with_cuda(self) -> bool:
        """Whether ops with GPU kernels are loaded."""
        return _library.libraries["_cuda"].loaded

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(f"'NativeLibrary' object has no attribute '{name}'")
        library = _library.libraries["_cuda"]
        if name in _SYMBOLS and library.loaded:
            return _symbol(library.path, name)

        def call(*args, **kwargs) -> NoReturn:
            why = f"needs GPU kernels: {library.reason}" if name in _SYMBOLS else "does not exist"
            raise RuntimeError(
                f"lib.{name} {why}; call bitsandbytes.functional or torch.ops.bitsandbytes "
                "instead, and see python -m bitsandbytes for what is loaded"
            )

        call.__name__ = name
        return call

    def __getitem__(self, name: str) -> Callable[..., None]:
        return getattr(self, name)


lib = NativeLibrary()
COMPILED_WITH_CUDA = lib.compiled_with_cuda


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
