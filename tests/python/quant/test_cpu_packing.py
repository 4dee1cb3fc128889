# SPDX-License-Identifier: MIT
"""The public package's packing of 4-bit weights for some CPUs."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F


def weight(rows, columns, blocksize, nested=False, storage=torch.uint8):
    packed = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8).view(storage)
    absmax = torch.rand(rows * columns // blocksize) + 0.5
    offset = state2 = None
    if nested:
        offset = absmax.mean()
        absmax, state2 = F.quantize_blockwise(absmax - offset, blocksize=256)
    state = F.QuantState(
        absmax,
        shape=torch.Size((rows, columns)),
        code=torch.linspace(-1, 1, 16),
        blocksize=blocksize,
        quant_type="nf4",
        dtype=torch.float16,
        offset=offset,
        state2=state2,
    )
    return packed.reshape(-1, 1), state


def test_no_kernel_wants_it():
    assert F.has_avx512bf16() is False


@pytest.mark.parametrize("block_n", [32, 16])
def test_bytes_follow_the_definition(block_n):
    rows, columns = 64, 12
    qweight, state = weight(rows, columns, 4)
    nibbles = np.stack([qweight.numpy().ravel() >> 4, qweight.numpy().ravel() & 15], 1)
    nibbles = nibbles.reshape(rows, columns)
    packed, same = F._convert_weight_packed_for_cpu(qweight, state, block_n)
    assert same is state and packed.shape == (rows, columns // 2) and packed.dtype == torch.uint8
    want = []
    for first in range(0, rows, block_n):
        for c in range(0, columns, 2):
            sequence = nibbles[first : first + block_n, c : c + 2].ravel()
            want += [sequence[j] | sequence[j + block_n] << 4 for j in range(block_n)]
    np.testing.assert_array_equal(packed.numpy().ravel(), np.array(want, np.uint8))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_there_and_back(nested, storage):
    qweight, state = weight(64, 128, 32, nested, storage)
    scales = state.absmax
    if nested:
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed, state = F._convert_weight_packed_for_cpu(qweight, state)
    assert not state.nested and getattr(state, "state2", None) is None
    assert state.absmax.shape == (4, 64) and state.absmax.is_contiguous()
    assert torch.equal(state.absmax, scales.view(64, 4).t().bfloat16())
    assert state.dtype == torch.bfloat16 and state.packing_format_for_cpu
    assert state.original_dtype == torch.float16 and state.original_nested == nested
    assert state.original_qshape == qweight.shape
    assert hasattr(state, "original_storage_type") == (storage != torch.uint8)
    back, state = F._convert_weight_packed_for_cpu_inverse(packed, state)
    assert back.dtype == storage and back.shape == qweight.shape
    assert torch.equal(back.view(torch.uint8), qweight.view(torch.uint8))
    assert state.nested == nested and state.dtype == torch.float16
    again = state.absmax
    if nested:
        assert state.state2.blocksize == 256
        again = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # bfloat16 keeps 8 bits; the second quantization errs by at most 1/64 of the largest deviation.
    torch.testing.assert_close(again, scales, rtol=2**-8, atol=0.5 / 64 if nested else 0)


@pytest.mark.parametrize("shape", [(33, 64), (64, 63)])
def test_shapes_that_do_not_fit(shape):
    qweight, state = weight(64, 64, 64)
    state.shape = torch.Size(shape)
    with pytest.raises(
        AssertionError, match=r"^_convert_weight_packed_for_cpu: .* must be .*, got"
    ):
        F._convert_weight_packed_for_cpu(qweight, state)
    state.shape = torch.Size((64 * 64,))
    with pytest.raises(AssertionError, match=r"two dimensions"):
        F._convert_weight_packed_for_cpu(qweight, state)
