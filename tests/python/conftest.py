# SPDX-License-Identifier: MIT
"""Fixtures of the Python tests that need the package."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from bitsandbytes import _library, paged

_native = _library.native_module()


def pytest_configure(config: pytest.Config) -> None:
    """With --emulated, kernels of the GPU take the place of the CPU's."""
    config.addinivalue_line("markers", "cpu_kernels: tests what only the kernels of the CPU do")
    if config.getoption("--emulated"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are replaced is what is wanted
            torch.ops.load_library(config.getoption("--emulated"))
        _library.libraries["_ops"].path = Path(config.getoption("--emulated"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what does not hold for emulated kernels."""
    if config.getoption("--emulated"):
        for item in items:
            if item.get_closest_marker("cpu_kernels") or "cpu_isa" in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason="kernels of the GPU run"))


@pytest.fixture(params=_native.available_cpu_isas() if _native else [])
def cpu_isa(request) -> str:
    """Each instruction set of the CPU kernels that this processor runs; the choice is restored."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa(before)


@pytest.fixture
def gpu_kernels(request, device) -> bool:
    """Whether what runs on `device` are kernels for a GPU."""
    return device == "cuda" or bool(request.config.getoption("--emulated"))


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
