# SPDX-License-Identifier: MIT
"""Fixtures of the Python tests that need the package."""

import os
import re

import pytest
import torch
from ranks import Ranks

from bitsandbytes import _library, paged

_native = _library.native_module()


@pytest.fixture(params=_native.available_cpu_isas() if _native else [])
def cpu_isa(request) -> str:
    """Each instruction set of the CPU kernels that this processor runs; the choice is restored."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa(before)


@pytest.fixture
def compile_fresh():
    """torch.compile without what earlier tests left: it counts recompilations per function."""
    torch._dynamo.reset()
    return torch.compile


@pytest.fixture
def paged_device() -> torch.device:
    """A CUDA or ROCm device with paged memory; it must be there where BNB_REQUIRE names cuda."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    device = torch.device("cuda", index)
    reason = paged.unavailable(device)
    if reason is not None:
        required = "cuda" in re.split(r"[\s,]+", os.environ.get("BNB_REQUIRE", ""))
        (pytest.fail if required else pytest.skip)(reason)
    return device


@pytest.fixture(scope="session")
def pool():
    """Runs functions on several processes: ``pool(2, "gloo", function, ...)``."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(params=["gloo", "nccl"])
def backend(request) -> str:
    """Each library that processes may talk by; NCCL needs two GPUs."""
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return request.param
