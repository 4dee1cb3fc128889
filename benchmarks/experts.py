# SPDX-License-Identifier: MIT
"""Benchmarks of the experts of a mixture on one CUDA device, beside torch's product in bfloat16."""

import functools
import gc

import torch
from harness import Record, captured, time_cuda
from torch import Tensor

import bitsandbytes as bnb

DEVICE = "cuda"
DTYPE = torch.bfloat16
# Experts, their weight, and experts of a token: Mixtral 8x7B and Qwen3-30B-A3B.
SHAPES = ((8, 14336, 4096, 2), (128, 1536, 2048, 8))
TOKENS = (1, 16, 64, 512, 4096)
# Routings that take turns, so that few tokens do not find their experts in a cache.
ROUTINGS = 12


def route(tokens: int, experts: int, top_k: int) -> Tensor:
    """Returns where the rows of each expert end, for tokens that draw their experts."""
    chosen = torch.rand(tokens, experts, device=DEVICE).topk(top_k).indices.flatten()
    _, offs = bnb.nn.group_by_expert(chosen, experts)
    return offs.int()


def experts(record: Record, bandwidth: float) -> None:
    """Products of tokens, sorted by expert, with the weights of their experts."""
    for count, n, k, top_k in SHAPES:
        weights = torch.randn(count, n, k, device=DEVICE, dtype=DTYPE)
        packed, state = bnb.functional.quantize_4bit(weights, quant_type="nf4")
        for tokens in TOKENS:
            rows = tokens * top_k
            a = torch.randn(rows, k, device=DEVICE, dtype=DTYPE)
            grad = torch.randn(rows, n, device=DEVICE, dtype=DTYPE)
            routings = [route(tokens, count, top_k) for _ in range(ROUTINGS)]
            hit = sum((o.diff(prepend=o[:1] * 0) > 0).sum().item() for o in routings) / ROUTINGS
            products = {
                "": (
                    functools.partial(bnb.grouped_matmul_4bit, a, packed, quant_state=state),
                    functools.partial(torch.nn.functional.grouped_mm, a, weights.mT),
                ),
                "/dgrad": (
                    functools.partial(
                        bnb.grouped_matmul_4bit, grad, packed, quant_state=state, transposed=True
                    ),
                    functools.partial(torch.nn.functional.grouped_mm, grad, weights),
                ),
            }
            for name, (product, dense) in products.items():
                ms, dense_ms = (_time(work, routings) for work in (product, dense))
                floor = (hit * n * k * (0.5 + 4 / 64) + 2 * rows * (n + k)) / bandwidth
                record.add(
                    f"experts/{count}x{n}x{k}/top{top_k}/tokens{tokens}{name}",
                    ms,
                    times_bf16=dense_ms / ms,
                    of_copy=floor / ms,
                    tflops=2e-9 * rows * n * k / ms,
                )
        del weights, packed, state, products, product, dense
        gc.collect()
        torch.cuda.empty_cache()


def _time(product, routings: list[Tensor]) -> float:
    """Milliseconds of one product, from replays of a graph of all routings."""

    def run() -> None:
        for offs in routings:
            product(offs=offs)

    with torch.no_grad():
        return time_cuda(captured(run), repeats=5) / len(routings)
