# SPDX-License-Identifier: MIT
"""Finds and loads the native libraries, and remembers which loaded and why another did not."""

import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["Library", "gpu_module", "libraries", "load", "native_module"]


@dataclass
class Library:
    """One native library: where it should be, and what became of it."""

    name: str
    serves: str
    path: Path | None = None
    loaded: bool = False
    reason: str = field(default="not tried")


libraries = {
    "_ops": Library("_ops", "cpu"),
    "_cuda": Library("_cuda", "cuda"),
}


def native_module():
    """Returns the binding module ``bitsandbytes._C``, or None when the package was not compiled."""
    if importlib.util.find_spec("bitsandbytes._C") is None:
        return None
    from . import _C

    return _C


@functools.cache
def gpu_module() -> tuple[ModuleType | None, str]:
    """Returns the binding module ``bitsandbytes._gpu``, or None and why there is none."""
    if torch.version.cuda is None and torch.version.hip is None:
        return None, "this torch was built without CUDA and without ROCm"
    try:
        if importlib.util.find_spec("bitsandbytes._gpu") is None:
            return None, "not part of this build (bitsandbytes._gpu is missing)"
        from . import _gpu
    except ImportError as error:
        return None, f"bitsandbytes._gpu does not load: {error}"
    return _gpu, "loaded"


def load() -> None:
    """Loads what this installation and this torch can use. Never raises and never prints."""
    try:
        module = native_module()
    except ImportError as error:
        for library in libraries.values():
            library.reason = f"bitsandbytes._C does not load: {error}"
        return
    if module is None:
        for library in libraries.values():
            library.reason = "bitsandbytes was installed without native code"
        return
    # An editable install keeps the compiled files apart from the sources: look beside the module.
    folder = Path(module.__file__).parent
    _load(libraries["_ops"], folder)
    if torch.version.cuda is None and torch.version.hip is None:
        libraries["_cuda"].reason = "this torch was built without CUDA and without ROCm"
    elif not libraries["_ops"].loaded:
        libraries["_cuda"].reason = "_ops did not load"
    else:
        _load(libraries["_cuda"], folder)


def _load(library: Library, folder: Path) -> None:
    library.path = folder / f"libbitsandbytes{library.name}.so"
    if not library.path.exists():
        library.reason = f"not part of this build ({library.path.name} is missing)"
        return
    try:
        torch.ops.load_library(str(library.path))
    except OSError as error:
        library.reason = str(error)
        return
    library.loaded = True
    library.reason = "loaded"
