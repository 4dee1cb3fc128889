# SPDX-License-Identifier: MIT
"""Fixtures of the Python tests that need the package."""

import pytest
import torch

from bitsandbytes import _library

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
