# SPDX-License-Identifier: MIT
"""Fixtures of the whole suite: the devices of this machine, seeds, and recorded results.

Environment:
    BNB_TEST_DEVICE: run on this one device only, such as "cpu" or "cuda".
    BNB_REQUIRE: words for what must be there; with "cuda" a missing GPU is a failure.
"""

import os
import random
import re
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples on every run of CI; new ones on every run of a developer.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))  # for `from reference import ...`


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of this suite."""
    parser.addoption(
        "--emulated",
        metavar="LIBRARY",
        help="run the GPU's kernels on the CPU: libbitsandbytes_emulated.so of a build with tests",
    )


def _devices() -> list:
    chosen = os.environ.get("BNB_TEST_DEVICE")
    if chosen:
        return [chosen]
    required = "cuda" in re.split(r"[\s,]+", os.environ.get("BNB_REQUIRE", ""))
    if torch.cuda.is_available() or required:
        return ["cpu", "cuda"]
    return ["cpu"]


@pytest.fixture(params=_devices())
def device(request) -> str:
    """Each device that this machine has and the environment asks for."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("BNB_REQUIRE or BNB_TEST_DEVICE names cuda, but torch finds no GPU")
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """Loads what the public bitsandbytes 0.50 computed on a GPU: golden(name) -> tensors."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    return lambda name: load_file(TESTS / "golden" / f"{name}.safetensors")
