# SPDX-License-Identifier: MIT
"""Benchmarks on one CUDA device, against its own copy bandwidth and PyTorch's fused optimizer.

    python benchmarks/gpu.py [--out FILE] [--only optimizer,quantize,linear4bit,...]

Every row names its floor: the bytes the work must move at least, over the measured bandwidth of a
device-to-device copy (bytes read plus bytes written).
"""

import argparse
import functools
import gc
from pathlib import Path

import experts
import layers
import torch
from harness import Record, time_cuda, time_host
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F

DEVICE = "cuda"
BLOCK = 256


def copy_bandwidth(record: Record) -> float:
    """Bytes per millisecond of a copy, read plus written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = time_cuda(lambda: target.copy_(source))
    record.add("copy", ms, GBps=2 * source.numel() / ms / 1e6)
    return 2 * source.numel() / ms


def llama_1b(dtype: torch.dtype) -> list[nn.Parameter]:
    """The 201 parameters, 1.1 billion numbers, of a Llama-architecture model."""
    layers, hidden, kv, inner, vocabulary = 22, 2048, 256, 5632, 32000
    shapes = [(vocabulary, hidden)]
    for _ in range(layers):
        shapes += [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    shapes += [(hidden,), (vocabulary, hidden)]
    return with_gradients(shapes, dtype)


def small(dtype: torch.dtype) -> list[nn.Parameter]:
    """2000 parameters of 16 thousand numbers."""
    return with_gradients([(128, 128)] * 2000, dtype)


def with_gradients(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    """Random parameters of these shapes with random gradients."""
    params = [nn.Parameter(torch.randn(s, device=DEVICE, dtype=dtype) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def time_step(
    record: Record,
    bandwidth: float,
    name: str,
    params: list[nn.Parameter],
    make,
    state_bytes: float,
) -> float:
    """Times the step of ``make(params)``, which moves `state_bytes` of states per number."""
    gc.collect()
    torch.cuda.empty_cache()
    instance = make(params, lr=1e-5)
    instance.step()
    ms = time_cuda(instance.step, repeats=11)
    host = time_host(instance.step)
    numbers = sum(p.numel() for p in params)
    floor = numbers * (3 * params[0].element_size() + state_bytes) / bandwidth
    record.add(name, ms, of_copy=floor / ms, floor_ms=floor, host_ms=host)
    return ms


def optimizer(record: Record, bandwidth: float) -> None:
    """Steps of every optimizer over whole parameter lists."""
    cases = {
        "llama1b/bf16": functools.partial(llama_1b, torch.bfloat16),
        "llama1b/fp32": functools.partial(llama_1b, torch.float32),
        "2000x16K/bf16": functools.partial(small, torch.bfloat16),
    }
    one_state, two_states, three_states = (k * (2 + 8 / BLOCK) for k in (1, 2, 3))
    ours = {
        "Adam8bit": (bnb.optim.Adam8bit, two_states),
        "AdamW8bit": (bnb.optim.AdamW8bit, two_states),
        "Lion8bit": (bnb.optim.Lion8bit, one_state),
        "SGD8bit": (functools.partial(bnb.optim.SGD8bit, momentum=0.9), one_state),
        "RMSprop8bit": (bnb.optim.RMSprop8bit, one_state),
        "Adagrad8bit": (bnb.optim.Adagrad8bit, one_state),
        "AdEMAMix8bit": (bnb.optim.AdEMAMix8bit, three_states),
        "PagedAdamW8bit": (bnb.optim.PagedAdamW8bit, two_states),
        "Adam32bit": (bnb.optim.Adam32bit, 16),
    }
    # Rules with a norm over whole tensors read everything twice.
    two_passes = {
        "LAMB8bit": (bnb.optim.LAMB8bit, two_states),
        "LARS8bit": (functools.partial(bnb.optim.LARS8bit, momentum=0.9), one_state),
        "Adam8bit(percentile_clipping=5)": (
            functools.partial(bnb.optim.Adam8bit, percentile_clipping=5),
            two_states,
        ),
    }
    for case, make_params in cases.items():
        params = make_params()
        prefix = f"optimizer/{case}"
        fused = functools.partial(torch.optim.AdamW, fused=True)
        moments = 4 * params[0].element_size()
        reference = time_step(
            record, bandwidth, f"{prefix}/torch.AdamW(fused)", params, fused, moments
        )
        size = params[0].element_size()
        first_pass = {"LAMB8bit": 2 * size + 2, "LARS8bit": 2 * size + 1}
        for name, (make, state_bytes) in {**ours, **two_passes}.items():
            if name in two_passes:
                state_bytes += first_pass.get(name, size)
            row = f"{prefix}/{name}"
            ms = time_step(record, bandwidth, row, params, make, state_bytes)
            record.rows[row]["times_torch_fused"] = reference / ms


def quantize(record: Record, bandwidth: float) -> None:
    """Blockwise quantization of a large tensor, and one small call."""
    n = 2**28
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(n, device=DEVICE, dtype=dtype)
        out = torch.empty_like(x)
        for blocksize in (64, 256, 4096):
            codes, state = F.quantize_blockwise(x, blocksize=blocksize)
            floor = (n * (x.element_size() + 1) + n / blocksize * 4) / bandwidth
            name = f"{str(dtype)[6:]}/block{blocksize}"
            work = functools.partial(F.quantize_blockwise, x, blocksize=blocksize)
            ms = time_cuda(work)
            record.add(f"quantize_blockwise/{name}", ms, of_copy=floor / ms)
            ms = time_cuda(functools.partial(F.dequantize_blockwise, codes, state, out=out))
            record.add(f"dequantize_blockwise/{name}", ms, of_copy=floor / ms)
            if blocksize == 4096:
                rand = torch.rand(2**16, device=DEVICE)
                ms = time_cuda(functools.partial(F.quantize_blockwise, x, rand=rand))
                record.add(f"quantize_blockwise(rand=)/{name}", ms, of_copy=floor / ms)
                code = F.create_linear_map().to(DEVICE)
                ms = time_cuda(functools.partial(F.quantize_blockwise, x, code=code))
                record.add(f"quantize_blockwise(code=)/{name}", ms, of_copy=floor / ms)
    x = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    ms = time_cuda(lambda: F.quantize_blockwise(x), inner=50)
    record.add("quantize_blockwise/4096x4096 bf16, one call", ms)


def quantize_4bit(record: Record, bandwidth: float) -> None:
    """4-bit quantization of a large tensor, and one small call."""
    n = 2**28
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(n, device=DEVICE, dtype=dtype)
        out = torch.empty_like(x)
        for quant_type, blocksize in (("nf4", 64), ("fp4", 64), ("nf4", 32), ("nf4", 4096)):
            for nested in (False, True):
                packed, state = F.quantize_4bit(x, None, None, blocksize, nested, quant_type)
                name = f"{str(dtype)[6:]}/{quant_type}/block{blocksize}"
                scale = 1 + 4 / 256 if nested else 4
                floor = (n * (x.element_size() + 0.5) + n / blocksize * scale) / bandwidth
                if nested:
                    name += "/nested"
                else:
                    ms = time_cuda(
                        functools.partial(
                            F.quantize_4bit, x, None, None, blocksize, False, quant_type
                        )
                    )
                    record.add(f"quantize_4bit/{name}", ms, of_copy=floor / ms)
                ms = time_cuda(functools.partial(F.dequantize_4bit, packed, state, out=out))
                record.add(f"dequantize_4bit/{name}", ms, of_copy=floor / ms)
    x = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    ms = time_cuda(lambda: F.quantize_nf4(x), inner=50)
    record.add("quantize_4bit/4096x4096 bf16 nf4, one call", ms)


def quantiles(record: Record, bandwidth: float) -> None:
    """Exact quantiles of 16 million numbers, beside torch.quantile; one read is the floor."""
    n = 2**24
    q = torch.linspace(1 / 512, 511 / 512, 256, device=DEVICE)
    normal = torch.randn(n, device=DEVICE)
    reference = time_cuda(lambda: torch.quantile(normal, q), repeats=5)
    record.add("torch.quantile/float32/normal", reference)
    for name, x in {
        "float32/normal": normal,
        "float32/half zeros": normal.relu(),
        "float32/constant": torch.ones_like(normal),
        "bfloat16/normal": normal.bfloat16(),
    }.items():
        floor = n * x.element_size() / 2 / bandwidth
        ms = time_cuda(functools.partial(F.estimate_quantiles, x))
        row = f"estimate_quantiles/{name}"
        record.add(row, ms, times_torch_quantile=reference / ms, of_copy=floor / ms)


PARTS = {
    "optimizer": optimizer,
    "quantize": quantize,
    "quantize_4bit": quantize_4bit,
    "quantiles": quantiles,
    "linear4bit": layers.linear4bit,
    "linear8bit": layers.linear8bit,
    "training": layers.training,
    "experts": experts.experts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "gpu.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts: {', '.join(PARTS)}")
    args = parser.parse_args()
    torch.manual_seed(0)
    record = Record("cuda")
    bandwidth = copy_bandwidth(record)
    for name in args.only.split(","):
        PARTS[name](record, bandwidth)
    record.write(args.out)


if __name__ == "__main__":
    main()
