# SPDX-License-Identifier: MIT
"""Which code runs where: devices of this machine, native ops on them, GPU code of this build."""

import re
from dataclasses import dataclass

import torch

from .._ops import NAMESPACE, SCHEMAS

__all__ = ["Gpu", "code_for", "devices", "gpus", "ops_by_kind"]


@dataclass(frozen=True)
class Gpu:
    """A CUDA or ROCm device that torch sees; `architecture` is such as "9.0" or "gfx942"."""

    index: int
    name: str
    architecture: str


def gpus() -> list[Gpu]:
    """Returns the CUDA or ROCm devices that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            architecture = facts.gcnArchName.partition(":")[0]
        else:
            architecture = f"{facts.major}.{facts.minor}"
        found.append(Gpu(index, facts.name, architecture))
    return found


def devices() -> list[torch.device]:
    """Returns the CPU and every accelerator that torch sees."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        found += [torch.device(accelerator.type, index) for index in range(count)]
    return found


def ops_by_kind(device_type: str) -> tuple[list[str], list[str]]:
    """Returns the ops with a native kernel for a device type, and those in plain PyTorch."""
    key = torch._C._dispatch_key_for_device(device_type)
    native, plain = [], []
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
        (native if has_kernel else plain).append(name)
    return native, plain


def code_for(architecture: str, built: str) -> str | None:
    """Says which code of a build runs on a GPU, or returns None if there is none.

    Machine code of compute capability X.y runs on X.z with z >= y, PTX on everything from X.y on.
    Architectures with suffix ``a`` run on X.y alone, those with suffix ``f`` on the family X.z.

    Args:
        architecture: Compute capability such as ``"9.0"``, or AMD's name such as ``"gfx942"``.
        built: Architectures of the build, separated by commas, as CMake names them: ``80-real``
            is machine code, ``80-virtual`` PTX, and ``80`` both.
    """
    entries = [entry for entry in built.split(",") if entry]
    if architecture.startswith("gfx"):
        return "machine code" if architecture in (e.partition(":")[0] for e in entries) else None
    major, minor = (int(part) for part in architecture.split("."))
    ptx = None
    for entry in entries:
        if entry in ("all", "all-major", "native"):
            return f"decided when it was built ({entry})"
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if match is None:
            continue
        base = (int(match[1]), int(match[2]))
        family = major == base[0] and minor >= base[1]
        exact = (major, minor) == base
        kind = match[4]
        if kind != "-virtual" and (exact if match[3] == "a" else family):
            return f"machine code ({entry})"
        runs = {"a": exact, "f": family, "": (major, minor) >= base}[match[3]]
        if kind != "-real" and runs:
            ptx = f"PTX ({entry}), which the driver compiles at first use"
    return ptx
