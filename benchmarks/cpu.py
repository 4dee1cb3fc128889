# SPDX-License-Identifier: MIT
"""Benchmarks on the CPU, each beside PyTorch's own part in the same run.

python benchmarks/cpu.py [--out FILE] [--only optimizer,quantize,gemm_4bit]
"""

import argparse
import functools
from pathlib import Path

import torch
from harness import Record, time_cpu
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.quant.scales import weight_arguments


def parameters(n: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Eight parameters of `n` numbers in all, with gradients."""
    params = [nn.Parameter((torch.randn(n // 8) * 0.02).to(dtype)) for _ in range(8)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def optimizer(record: Record) -> None:
    """Steps over 33 million parameters, against torch's fused AdamW."""
    n = 2**25
    for dtype in (torch.float32, torch.bfloat16):
        fused = torch.optim.AdamW(parameters(n, dtype), lr=1e-5, fused=True)
        for cls, kwargs in (
            (bnb.optim.Adam8bit, {}),
            (bnb.optim.AdamW8bit, {}),
            (bnb.optim.Lion8bit, {}),
            (bnb.optim.SGD8bit, {"momentum": 0.9}),
            (bnb.optim.RMSprop8bit, {}),
            (bnb.optim.Adagrad8bit, {}),
            (bnb.optim.Adam32bit, {}),
        ):
            ours = cls(parameters(n, dtype), lr=1e-5, **kwargs)
            ms, reference = time_cpu(ours.step, fused.step)
            name = f"optimizer/{str(dtype)[6:]}/{cls.__name__}"
            record.add(name, ms, torch_fused_ms=reference, times_torch_fused=reference / ms)


def quantize(record: Record) -> None:
    """Blockwise quantization of 33 million numbers, against a copy of them."""
    n = 2**25
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n).to(dtype)
        target = torch.empty_like(x)
        for blocksize in (256, 4096):
            codes, state = F.quantize_blockwise(x, blocksize=blocksize)
            name = f"{str(dtype)[6:]}/block{blocksize}"
            works = {
                "quantize": functools.partial(F.quantize_blockwise, x, blocksize=blocksize),
                "dequantize": functools.partial(F.dequantize_blockwise, codes, state),
                "dequantize(out=)": functools.partial(
                    F.dequantize_blockwise, codes, state, out=target
                ),
            }
            for verb, work in works.items():
                ms, copy = time_cpu(work, functools.partial(target.copy_, x))
                record.add(f"{verb}_blockwise/{name}", ms, copy_ms=copy, times_copy=copy / ms)


def gemm_4bit(record: Record) -> None:
    """Products with an NF4 weight, forward and for the gradient, against bfloat16 weights."""
    n, k = 14336, 4096
    weight = torch.randn(n, k) * k**-0.5
    for dtype in (torch.bfloat16, torch.float16):
        linear = nn.Linear(k, n, bias=False).to(dtype)
        for nested in (False, True):
            packed, state = F.quantize_4bit(
                weight.to(dtype), quant_type="nf4", compress_statistics=nested
            )
            arguments, scales = weight_arguments(state, packed.device)
            for rows in (1, 4, 16, 64, 256):
                x, grad = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
                ops = torch.ops.bitsandbytes
                works = {
                    "gemm_4bit": (
                        functools.partial(ops.gemm_4bit, x, packed, *arguments, None, *scales),
                        functools.partial(nn.functional.linear, x, linear.weight.detach()),
                    ),
                    "gemm_4bit_dgrad": (
                        functools.partial(ops.gemm_4bit_dgrad, grad, packed, *arguments, *scales),
                        functools.partial(torch.mm, grad, linear.weight.detach()),
                    ),
                }
                for verb, (work, dense) in works.items():
                    ms, dense_ms = time_cpu(work, dense)
                    kind = "nested" if nested else "plain"
                    name = f"{verb}/{str(dtype)[6:]}/{kind}/{n}x{k}/rows{rows}"
                    record.add(name, ms, dense_ms=dense_ms, times_dense=dense_ms / ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "cpu.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--only", default="optimizer,quantize,gemm_4bit")
    args = parser.parse_args()
    torch.manual_seed(0)
    record = Record("cpu")
    for name in args.only.split(","):
        {"optimizer": optimizer, "quantize": quantize, "gemm_4bit": gemm_4bit}[name](record)
    record.write(args.out)


if __name__ == "__main__":
    main()
