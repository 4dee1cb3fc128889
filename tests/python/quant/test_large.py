# SPDX-License-Identifier: MIT
"""Tensors of more than 2^31 elements, on a GPU that has the memory: no index is 32 bits wide."""

import pytest
import torch

import bitsandbytes.functional as F

ops = torch.ops.bitsandbytes
SIZES = [2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3]
PERIOD = 2**20 + 4096  # elements after which the numbers repeat; whole blocks


@pytest.fixture(scope="module", params=SIZES)
def large(request) -> torch.Tensor:
    """So many bfloat16 numbers, and on the way out, their memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if torch.cuda.mem_get_info()[0] < 14 * request.param:
        pytest.skip("needs 14 bytes of free memory per element")
    n = request.param
    pattern = torch.randn(PERIOD, device="cuda", generator=_generator()).bfloat16()
    yield pattern.repeat(-(-n // PERIOD))[:n]
    torch.cuda.empty_cache()


def _generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def assert_repeats(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Whether a result repeats what one period gives, to its last element."""
    for part in result.flatten().split(expected.numel() * 256):
        whole = part.numel() // expected.numel()
        rows = part[: whole * expected.numel()].view(whole, expected.numel())
        assert torch.equal(rows, expected.flatten().expand_as(rows))
        rest = part[whole * expected.numel() :]
        assert torch.equal(rest, expected.flatten()[: rest.numel()])


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_8bit(large, blocksize):
    code = F.create_dynamic_map().cuda()
    codes, absmax = ops.quantize_blockwise(large, code, blocksize)
    first, scales = ops.quantize_blockwise(large[:PERIOD], code, blocksize)
    whole = large.numel() // blocksize * blocksize
    assert_repeats(codes[:whole], first)
    assert_repeats(absmax[: whole // blocksize], scales)
    values = ops.dequantize_blockwise(codes, absmax, code, blocksize, torch.bfloat16)
    expected = ops.dequantize_blockwise(first, scales, code, blocksize, torch.bfloat16)
    assert_repeats(values[:whole], expected)
    if whole < large.numel():
        rest, scale = ops.quantize_blockwise(large[whole:], code, blocksize)
        assert torch.equal(codes[whole:], rest) and torch.equal(absmax[-1:], scale)
        rest = ops.dequantize_blockwise(rest, scale, code, blocksize, torch.bfloat16)
        assert torch.equal(values[whole:], rest)


def test_without_scales(large):
    code = F.create_linear_map().cuda()
    first = ops.quantize_no_absmax(large[:PERIOD], code)
    assert_repeats(ops.quantize_no_absmax(large, code), first)


def test_stochastic(large):
    code = F.create_dynamic_map().cuda()
    rand = torch.rand(4096, device="cuda", generator=_generator())  # a divisor of the period
    codes, _ = ops.quantize_blockwise_stochastic(large, code, 256, rand, 5)
    first, _ = ops.quantize_blockwise_stochastic(large[:PERIOD], code, 256, rand, 5)
    # The last block may be short, and have another scale.
    whole = large.numel() // 256 * 256
    assert_repeats(codes[:whole], first)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit(large, quant_type):
    packed, absmax = ops.quantize_4bit(large, 64, quant_type, torch.uint8)
    first, scales = ops.quantize_4bit(large[:PERIOD], 64, quant_type, torch.uint8)
    whole = large.numel() // 64 * 64
    assert_repeats(packed[: whole // 2], first)
    assert_repeats(absmax[: whole // 64], scales)
    values = ops.dequantize_4bit(packed, absmax, 64, quant_type, large.shape, torch.bfloat16)
    expected = ops.dequantize_4bit(first, scales, 64, quant_type, (PERIOD,), torch.bfloat16)
    assert_repeats(values[:whole], expected)
    rest = large[whole:]
    if rest.numel():
        code, scale = ops.quantize_4bit(rest, 64, quant_type, torch.uint8)
        assert torch.equal(packed[whole // 2 :], code) and torch.equal(absmax[-1:], scale)


def test_quantiles(large):
    quantiles = F.estimate_quantiles(large)
    n = large.numel()
    in_order = large[:PERIOD].float().sort().values
    offset = 1 / 512
    ranks = (offset + torch.arange(256).double() * (1 - 2 * offset) / 255) * (n - 1)
    # A period more or less moves a rank by one in that of a period.
    at = (ranks / n * PERIOD).long().clamp(2, PERIOD - 3).cuda()
    assert ((quantiles >= in_order[at - 2]) & (quantiles <= in_order[at + 2])).all()
