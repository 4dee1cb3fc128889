# SPDX-License-Identifier: MIT
"""Benchmarks on the CPU, each beside PyTorch's own part in the same run.

python benchmarks/cpu.py [--out FILE] [--only optimizer,host,quantize,quantize_4bit,gemm_4bit,...]
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


def host(record: Record) -> None:
    """What a step costs before it computes: 2000 parameters without elements."""

    def params() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.empty(0, dtype=torch.bfloat16)) for _ in range(2000)]
        for p in made:
            p.grad = torch.empty_like(p)
        return made

    fused = torch.optim.AdamW(params(), lr=1e-5, fused=True)
    for cls, kwargs in (
        (bnb.optim.Adam8bit, {"min_8bit_size": 0}),
        (bnb.optim.AdEMAMix8bit, {"min_8bit_size": 0}),
        (bnb.optim.Lion8bit, {"min_8bit_size": 0}),
        (bnb.optim.Adam32bit, {}),
    ):
        ours = cls(params(), lr=1e-5, **kwargs)
        ours.step()  # the second step makes a plan
        ms, reference = time_cpu(ours.step, fused.step, repeats=101)
        name = f"host/2000x0/{cls.__name__}"
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
        rand, linear = torch.rand(2**16), F.create_linear_map()
        for option, arguments in {"rand": {"rand": rand}, "code": {"code": linear}}.items():
            work = functools.partial(F.quantize_blockwise, x, **arguments)
            ms, copy = time_cpu(work, functools.partial(target.copy_, x))
            row = f"quantize_blockwise({option}=)/{str(dtype)[6:]}/block4096"
            record.add(row, ms, copy_ms=copy, times_copy=copy / ms)


def quantiles(record: Record) -> None:
    """Exact quantiles of 16 million numbers, beside torch.quantile."""
    x = torch.randn(2**24)
    q = torch.linspace(1 / 512, 511 / 512, 256)
    (reference,) = time_cpu(functools.partial(torch.quantile, x, q), repeats=3)
    record.add("torch.quantile/float32", reference)
    for dtype in (torch.float32, torch.bfloat16):
        (ms,) = time_cpu(functools.partial(F.estimate_quantiles, x.to(dtype)))
        row = f"estimate_quantiles/{str(dtype)[6:]}"
        record.add(row, ms, times_torch_quantile=reference / ms)


def quantize_4bit(record: Record) -> None:
    """4-bit quantization of 33 million numbers, against a copy of them."""
    n = 2**25
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n).to(dtype)
        target = torch.empty_like(x)
        copy_work = functools.partial(target.copy_, x)
        for quant_type in ("nf4", "fp4"):
            for nested in (False, True):
                quantize = functools.partial(
                    F.quantize_4bit, x, quant_type=quant_type, compress_statistics=nested
                )
                packed, state = quantize()
                works = {
                    "quantize": quantize,
                    "dequantize": functools.partial(F.dequantize_4bit, packed, state),
                    "dequantize(out=)": functools.partial(
                        F.dequantize_4bit, packed, state, out=target
                    ),
                }
                name = f"{str(dtype)[6:]}/{quant_type}{'/nested' if nested else ''}"
                for verb, work in works.items():
                    ms, copy = time_cpu(work, copy_work)
                    record.add(f"{verb}_4bit/{name}", ms, copy_ms=copy, times_copy=copy / ms)


def gemm_4bit(record: Record) -> None:
    """Products with an NF4 weight, forward and for the gradient, against bfloat16 weights."""
    n, k = 14336, 4096
    weight = torch.randn(n, k) * k**-0.5
    # PyTorch's products of float16 matrices take seconds on a CPU.
    dense_weight = weight.bfloat16()
    for dtype in (torch.bfloat16, torch.float16):
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
                        functools.partial(nn.functional.linear, x.bfloat16(), dense_weight),
                    ),
                    "gemm_4bit_dgrad": (
                        functools.partial(ops.gemm_4bit_dgrad, grad, packed, *arguments, *scales),
                        functools.partial(torch.mm, grad.bfloat16(), dense_weight),
                    ),
                }
                for verb, (work, dense) in works.items():
                    ms, dense_ms = time_cpu(work, dense)
                    kind = "nested" if nested else "plain"
                    name = f"{verb}/{str(dtype)[6:]}/{kind}/{n}x{k}/rows{rows}"
                    record.add(name, ms, dense_ms=dense_ms, times_dense=dense_ms / ms)


def int8_linear(record: Record) -> None:
    """The layer of LLM.int8() against bfloat16 weights, without and with outlier columns."""
    n, k = 14336, 4096
    linear = nn.Linear(k, n, bias=False).to(torch.bfloat16)
    codes, stats, _ = F.int8_vectorwise_quant(linear.weight.detach())
    for rows in (1, 4, 16, 64, 256):
        x = torch.randn(rows, k).to(torch.bfloat16)
        outliers = x.clone()
        outliers[:, :: k // 10] *= 20
        for threshold, inputs in ((0.0, x), (6.0, outliers)):
            ms, dense_ms = time_cpu(
                functools.partial(
                    torch.ops.bitsandbytes.int8_linear, inputs, codes, stats, None, threshold
                ),
                functools.partial(nn.functional.linear, inputs, linear.weight.detach()),
            )
            name = f"int8_linear/bfloat16/threshold{threshold:g}/{n}x{k}/rows{rows}"
            record.add(name, ms, dense_ms=dense_ms, times_dense=dense_ms / ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "cpu.json"
    parser.add_argument("--out", type=Path, default=default)
    everything = "optimizer,host,quantize,quantize_4bit,gemm_4bit,int8_linear,quantiles"
    parser.add_argument("--only", default=everything)
    args = parser.parse_args()
    torch.manual_seed(0)
    record = Record("cpu")
    for name in args.only.split(","):
        parts = {
            "optimizer": optimizer,
            "host": host,
            "quantize": quantize,
            "quantize_4bit": quantize_4bit,
            "quantiles": quantiles,
            "gemm_4bit": gemm_4bit,
            "int8_linear": int8_linear,
        }
        parts[name](record)
    record.write(args.out)


if __name__ == "__main__":
    main()
