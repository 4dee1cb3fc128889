# SPDX-License-Identifier: MIT
"""Benchmarks of layers on one CUDA device, each beside `nn.Linear` in bfloat16 in the same run.

Weights take turns, so that no cache holds them from one call to the next. Times of the kernels come
from replays of a CUDA graph; eager times have the host's part in them.
"""

import functools
import gc
from collections.abc import Callable

import torch
from harness import Record, captured, time_cuda, time_host
from torch import Tensor, nn

import bitsandbytes as bnb

DEVICE = "cuda"
DTYPE = torch.bfloat16
# Bytes of weights that take turns: several times what the second-level cache holds.
ROTATED = 2**28
SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)


def turns(make: Callable[[], nn.Module], weight_bytes: float) -> list[nn.Module]:
    """Returns so many layers that their weights together do not fit a cache."""
    return [make() for _ in range(max(1, round(ROTATED / weight_bytes)))]


def time_graph(layers: list[nn.Module], x: Tensor) -> float:
    """Milliseconds of the kernels of one layer, from replays of a graph of all of them."""
    rounds = -(-8 // len(layers))
    work = [functools.partial(layer, x) for layer in layers] * rounds

    def run() -> None:
        for call in work:
            call()

    return time_cuda(captured(run), repeats=9) / len(work)


def packed(linear: nn.Linear, nested: bool) -> nn.Module:
    """Returns a layer with NF4 codes of the weight of `linear`."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=DTYPE,
        compress_statistics=nested,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, compress_statistics=nested, quant_type="nf4", module=layer
    )
    return layer.to(DEVICE)


def linear4bit(record: Record, bandwidth: float) -> None:
    """Forward passes of 4-bit layers over the shapes of Llama models."""
    for n, k in SHAPES:
        dense = functools.partial(nn.Linear, k, n, bias=False, device=DEVICE, dtype=DTYPE)
        reference = turns(dense, 2 * n * k)
        kinds = (False, True) if (n, k) == SHAPES[-1] else (False,)
        _linear4bit(record, bandwidth, reference, kinds)
        gc.collect()
        torch.cuda.empty_cache()


def _linear4bit(
    record: Record, bandwidth: float, reference: list[nn.Module], kinds: tuple[bool, ...]
) -> None:
    """Kinds, whether scales are nested, take turns for every number of tokens.

    Products of many tokens lower the clock of those that come soon after.
    """
    n, k = reference[0].weight.shape
    layers = {
        nested: turns(functools.partial(packed, reference[0], nested), 0.5 * n * k)
        for nested in kinds
    }
    for m in TOKENS:
        x = torch.randn(m, k, device=DEVICE, dtype=DTYPE)
        for nested in kinds:
            facts = {}
            with torch.no_grad():
                ms, dense_ms = time_graph(layers[nested], x), time_graph(reference, x)
                if m == 1:
                    first = functools.partial(layers[nested][0], x)
                    facts["eager_host_us"] = 1e3 * time_host(first)
            scales = (1 + 4 / 256 if nested else 4) / 64
            floor = (n * k * (0.5 + scales) + 2 * m * (n + k)) / bandwidth
            record.add(
                f"linear4bit/{n}x{k}{'/nested' if nested else ''}/tokens{m}",
                ms,
                times_bf16=dense_ms / ms,
                of_copy=floor / ms,
                tflops=2e-9 * m * n * k / ms,
                **facts,
            )


def linear8bit(record: Record, bandwidth: float) -> None:
    """Forward passes of int8 layers, without and with a look for outlier columns."""
    for n, k in SHAPES:
        dense = functools.partial(nn.Linear, k, n, device=DEVICE, dtype=DTYPE)
        reference = turns(dense, 2 * n * k)
        for threshold in (0.0, 6.0):
            _linear8bit(record, bandwidth, reference, threshold)
        gc.collect()
        torch.cuda.empty_cache()


def in_int8(linear: nn.Linear, threshold: float) -> nn.Module:
    """Returns a layer with int8 rows of the weight of `linear`."""
    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)


def _linear8bit(
    record: Record, bandwidth: float, reference: list[nn.Module], threshold: float
) -> None:
    n, k = reference[0].weight.shape
    layers = turns(functools.partial(in_int8, reference[0], threshold), n * k)
    for m in (1, 8, 32, 128, 512, 2048, 8192):
        x = torch.randn(m, k, device=DEVICE, dtype=DTYPE)
        if threshold:
            x[:, ::512] *= 10  # columns of outliers
        facts = {}
        with torch.no_grad():
            ms, dense_ms = time_graph(layers, x), time_graph(reference, x)
            if m == 1:
                facts["eager_host_us"] = 1e3 * time_host(functools.partial(layers[0], x))
        floor = (n * k + 2 * m * (n + k)) / bandwidth
        record.add(
            f"linear8bit/{n}x{k}/threshold{threshold:g}/tokens{m}",
            ms,
            times_bf16=dense_ms / ms,
            of_copy=floor / ms,
            tops=2e-9 * m * n * k / ms,
            **facts,
        )


def training(record: Record, bandwidth: float) -> None:
    """Forward and backward pass over a frozen layer, as in fine-tuning with adapters."""
    n, k = 14336, 4096
    dense = nn.Linear(k, n, bias=False, device=DEVICE, dtype=DTYPE).requires_grad_(False)
    layers = {"linear4bit": packed(dense, False), "linear8bit": in_int8(dense, 6.0)}
    for m in (16, 128, 512, 4096):
        x = torch.randn(m, k, device=DEVICE, dtype=DTYPE, requires_grad=True)
        grad = torch.randn(m, n, device=DEVICE, dtype=DTYPE)

        def step(layer: nn.Module, x: Tensor = x, grad: Tensor = grad) -> None:
            x.grad = None
            layer(x).backward(grad)

        reference = time_cuda(functools.partial(step, dense), inner=10)
        for name, layer in layers.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            ms = time_cuda(functools.partial(step, layer), inner=10)
            peak = torch.cuda.max_memory_allocated() - before
            record.add(
                f"training/{name}/{n}x{k}/tokens{m}",
                ms,
                times_bf16=reference / ms,
                peak_mb=peak / 1e6,
            )
