# SPDX-License-Identifier: MIT
"""Tensors that callers give for results: filled, or refused by name before anything is written."""

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F


def calls(device) -> dict:
    """Functions with an argument for each of their results, by name: a call and good outputs."""
    x = torch.randn(4, 64, device=device)
    codes, state = F.quantize_blockwise(x, blocksize=64)
    packed, state4 = F.quantize_4bit(x)
    int8, stats, _ = F.int8_vectorwise_quant(x)
    weight, weight_stats, _ = F.int8_vectorwise_quant(torch.randn(3, 64, device=device))
    sums = F.int8_linear_matmul(int8, weight)
    a3 = torch.randn(3, 64, device=device)

    def new(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    u8, i8 = torch.uint8, torch.int8
    return {
        "quantize_blockwise": (
            lambda **kw: F.quantize_blockwise(x, blocksize=64, **kw),
            {"absmax": new(4), "out": new(4, 64, dtype=u8)},
        ),
        "dequantize_blockwise": (
            lambda **kw: F.dequantize_blockwise(codes, state, **kw),
            {"out": new(4, 64)},
        ),
        "quantize_4bit": (
            lambda **kw: F.quantize_4bit(x, **kw),
            {"absmax": new(4), "out": new(128, 1, dtype=u8)},
        ),
        "dequantize_4bit": (
            lambda **kw: F.dequantize_4bit(packed, state4, **kw),
            {"out": new(4, 64)},
        ),
        "gemv_4bit": (
            lambda **kw: F.gemv_4bit(a3, packed, state=state4, **kw),
            {"out": new(3, 4)},
        ),
        "matmul_4bit": (
            lambda **kw: bnb.matmul_4bit(a3, packed, state4, **kw),
            {"out": new(3, 4)},
        ),
        "matmul": (lambda **kw: bnb.matmul(a3, x, **kw), {"out": new(3, 4)}),
        "matmul_cublas": (lambda **kw: bnb.matmul_cublas(a3, x.t(), **kw), {"out": new(3, 4)}),
        "quantize_no_absmax": (
            lambda **kw: F.quantize_no_absmax(x, state.code, **kw),
            {"out": new(4, 64, dtype=u8)},
        ),
        "dequantize_no_absmax": (
            lambda **kw: F.dequantize_no_absmax(codes, state.code, **kw),
            {"out": new(4, 64)},
        ),
        "quantize": (lambda **kw: F.quantize(x, **kw), {"out": new(4, 64, dtype=u8)}),
        "dequantize": (
            lambda **kw: F.dequantize(codes, absmax=stats.amax(), **kw),
            {"out": new(4, 64)},
        ),
        "estimate_quantiles": (lambda **kw: F.estimate_quantiles(x, **kw), {"out": new(256)}),
        "int8_mm_dequant": (
            lambda **kw: F.int8_mm_dequant(sums, stats, weight_stats, **kw),
            {"out": new(4, 3)},
        ),
        "igemm": (
            lambda **kw: F.igemm(int8, weight.t(), **kw),
            {"out": new(4, 3, dtype=torch.int32)},
        ),
        "double_quant": (
            lambda **kw: F.double_quant(x.half(), **kw),
            {
                "row_stats": new(4),
                "col_stats": new(64),
                "out_row": new(4, 64, dtype=i8),
                "out_col": new(4, 64, dtype=i8),
            },
        ),
        "get_colrow_absmax": (
            lambda **kw: F.get_colrow_absmax(x.half(), **kw),
            {"row_stats": new(4), "col_stats": new(64)},
        ),
        "transform": (
            lambda **kw: F.transform(int8, "col32", **kw),
            {"out": new(4, 64, dtype=i8)},
        ),
        "igemmlt": (
            lambda **kw: F.igemmlt(int8, weight, ((4, 64), "row"), ((3, 64), "row"), **kw),
            {"out": new(4, 3, dtype=torch.int32)},
        ),
    }


WRONG = {
    "size": lambda t: torch.zeros_like(torch.cat([t, t])),
    "expanded": lambda t: torch.zeros_like(t.flatten()[:1]).expand(t.shape),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", calls("cpu"))
def test_refused_before_anything_is_written(device, name, wrong):
    call, good = calls(device)[name]
    for argument in good:
        outputs = dict(good)
        outputs[argument] = WRONG[wrong](good[argument])
        with pytest.raises(ValueError, match=rf"^\w+: {argument} must .*, got .*shape"):
            call(**outputs)
        assert not any(t.any() for t in outputs.values())
    call(**good)
    assert all(t.any() for t in good.values())


@pytest.mark.parametrize("absmax", [torch.ones(3), torch.ones(4, 63)])
def test_dequantize_writes_no_levels_that_it_cannot_scale(device, absmax):
    out = torch.zeros(4, 64, device=device)
    with pytest.raises(RuntimeError):
        F.dequantize(torch.ones(4, 64, dtype=torch.uint8, device=device), absmax=absmax, out=out)
    assert not out.any()
