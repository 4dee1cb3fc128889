# SPDX-License-Identifier: MIT
"""The report of `python -m bitsandbytes`: environment, native code, and a check of every device."""

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from .. import _library, paged
from .._version import __version__
from . import checks, native
from .utils import print_dedented, print_header

__all__ = ["get_package_version", "main", "sanity_check", "show_environment", "show_native"]

RELATED_PACKAGES = (
    "accelerate",
    "diffusers",
    "numpy",
    "pip",
    "peft",
    "safetensors",
    "transformers",
    "triton",
    "trl",
)


def get_package_version(name: str) -> str:
    """Returns the version of an installed distribution, or ``"not found"``."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not found"


def show_environment() -> None:
    """Prints platform, Python, torch and the packages that are used along with this one."""
    print(f"Platform: {platform.platform()}")
    if platform.system() == "Linux":
        print(f"  libc: {'-'.join(platform.libc_ver())}")
    print(f"Python: {platform.python_version()}")
    print(f"PyTorch: {torch.__version__}")
    print(f"  CUDA: {torch.version.cuda or 'N/A'}")
    print(f"  HIP: {torch.version.hip or 'N/A'}")
    print(f"  XPU: {getattr(torch.version, 'xpu', None) or 'N/A'}")
    print("Related packages:")
    for name in RELATED_PACKAGES:
        print(f"  {name}: {get_package_version(name)}")


def show_native() -> list[str]:
    """Prints what was compiled, what of it loaded, and what serves each GPU.

    Returns:
        What is wrong, one sentence each.
    """
    try:
        module = _library.native_module()
    except ImportError as error:
        print("Build: bitsandbytes._C does not load")
        return [f"bitsandbytes._C does not load: {error}"]
    problems = []
    if module is None:
        print("Build: without native code; every op runs in plain PyTorch, which is slow")
        problems.append(
            "bitsandbytes was installed without native code: install it again where a C++ compiler "
            "is at hand"
        )
        built_for = ""
    else:
        facts = module.build_info()
        built_for = facts["gpu_architectures"]
        print(
            f"Build: version {facts['version']}, backend {facts['backend']}, "
            f"with torch {facts['torch']} and {facts['compiler']}"
        )
        print(f"  GPU code for: {built_for or 'none'}")
        if facts["version"] != __version__:
            print(f"  Note: the Python files are version {__version__}; build again")
        _show_cpu_isa(module)

    gpus = native.gpus()
    print("Native libraries:")
    for library in _library.libraries.values():
        place = f", {library.path}" if library.path is not None else ""
        print(f"  {library.name} (for {library.serves}): {library.reason}{place}")
        needed = library.name == "_ops" or (library.name == "_cuda" and gpus)
        if module is not None and needed and not library.loaded:
            problems.append(f"{library.name}, which serves {library.serves}: {library.reason}")

    loaded = _library.libraries["_cuda"].loaded
    for gpu in gpus:
        code = native.code_for(gpu.architecture, built_for) if loaded else None
        kind = "architecture" if gpu.architecture.startswith("gfx") else "compute capability"
        print(f"GPU {gpu.index}: {gpu.name}, {kind} {gpu.architecture}: {code or 'no native code'}")
        if loaded and code is None:
            problems.append(
                f"GPU {gpu.index} has {kind} {gpu.architecture}, and this build has code for "
                f"{built_for}: build again with that architecture"
            )
    if gpus and module is not None and facts["backend"] == "cpu":
        print_dedented("""
            This build is for the CPU. Where nvcc (or hipcc) is on PATH, build again with
              pip install . -C cmake.define.COMPUTE_BACKEND=cuda    (or hip)
        """)
    return problems


def _show_cpu_isa(module) -> None:
    isa = module.cpu_isa()
    print(f"CPU instruction set: {isa} in use, of {', '.join(module.available_cpu_isas())}")
    wanted = os.environ.get("BNB_CPU_ISA")
    if wanted is not None and wanted != isa:
        print(f"  Note: BNB_CPU_ISA={wanted} has no effect: not available here")


def sanity_check(devices: list[torch.device] | None = None) -> list[str]:
    """Runs small computations with known results, printing a line for each.

    Args:
        devices: Where; by default the CPU and every accelerator that torch sees.

    Returns:
        What failed, one sentence each; empty if all is well.
    """
    problems = []
    for device in native.devices() if devices is None else devices:
        with_kernel, plain = native.ops_by_kind(device.type)
        if not with_kernel:
            print(f"{device}: plain PyTorch for every op; no native code serves this device")
        else:
            print(f"{device}: native code; in plain PyTorch: {', '.join(plain) or 'nothing'}")
        print(f"  {'paged optimizers':30s} {paged.describe(device)}")
        problems += checks.run(device)
    return problems


def main() -> int:
    """Prints the report. Returns 0 if all is well, otherwise 1."""
    print_header(f"bitsandbytes v{__version__}")
    show_environment()
    print_header("")
    problems = show_native()
    devices = native.devices()
    if len(devices) == 1 and not native.gpus():
        loaded = "loaded" if _library.libraries["_ops"].loaded else "did not load"
        print(f"No CUDA, ROCm or other accelerator found; the CPU library {loaded}.")
        if torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists():
            print("  Note: there is an NVIDIA driver, but this torch was built without CUDA")
    print_header("")
    problems += sanity_check(devices)
    print_header("")
    for problem in problems:
        print(f"FAILED: {problem}")
    if problems:
        return 1
    print("SUCCESS!")
    return 0
