# SPDX-License-Identifier: MIT
"""Fixtures of the distributed tests."""

import pytest
import torch
from ranks import Ranks


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
