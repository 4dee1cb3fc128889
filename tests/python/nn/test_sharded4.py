# SPDX-License-Identifier: MIT
"""4-bit layers whose parameters PyTorch distributes (FSDP2, FSDP1), on two processes."""

import pytest
import torch
from sharded4_models import (
    run_bytes_that_are_cast,
    run_flattened,
    run_loading,
    run_mixed_precision,
    run_state_dict,
    run_training,
)

# Before, FSDP2 made parameters with gradients of all shards, which bytes cannot be.
SHARDS_BYTES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
BYTES = pytest.param(
    torch.uint8,
    marks=pytest.mark.skipif(not SHARDS_BYTES, reason="needs PyTorch 2.12 or later"),
)
STORAGES = [BYTES, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_training_equals_one_process(pool, backend, storage, reshard):
    pool(2, backend, run_training, storage, reshard)


@pytest.mark.parametrize("storage", [BYTES, torch.bfloat16])
def test_mixed_precision(pool, backend, storage):
    pool(2, backend, run_mixed_precision, storage)


def test_bytes_that_are_cast_get_a_sentence(pool, backend):
    pool(2, backend, run_bytes_that_are_cast)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_whole_state_dict(pool, backend, storage, trained):
    pool(2, backend, run_state_dict, storage, trained)


@pytest.mark.parametrize("how", ["full", "parts", "files"])
@pytest.mark.parametrize("storage", STORAGES)
def test_loading(pool, backend, storage, how, tmp_path):
    pool(2, backend, run_loading, storage, how, str(tmp_path))


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flattened_parameters(pool, backend, use_orig_params):
    pool(2, backend, run_flattened, use_orig_params)
