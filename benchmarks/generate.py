# SPDX-License-Identifier: MIT
"""Tokens per second of a Llama-architecture model: bfloat16 beside NF4, eager and as a CUDA graph.

    pip install "transformers>=5.23"
    python benchmarks/generate.py [--out FILE] [--device cuda] [--batches 1,16,64]

The weights are random, 1.2 billion of them in the shapes of Llama 3.2 1B; speed does not depend on
their values. Each sequence is continued greedily over a cache of fixed size.
The peak of memory is that of weights, cache and activations.
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import Record, captured
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import bitsandbytes as bnb

DTYPE = torch.bfloat16
PROMPT = 16
SIZES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}


def packed(model: nn.Module, device: str, nested: bool) -> nn.Module:
    """Returns a copy of `model` whose linear layers but the last hold NF4 codes."""
    model = copy.deepcopy(model)
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                layer = bnb.nn.LinearNF4(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=DTYPE,
                    compress_statistics=nested,
                )
                layer.load_state_dict(linear.state_dict())
                setattr(parent, name, layer)
    return model.to(device)


class Generation:
    """Greedy continuation of a batch, a token at a time; every step is the same work."""

    def __init__(self, model: nn.Module, batch: int, length: int):
        device = model.device
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.tokens = torch.ones(batch, 1, dtype=torch.long, device=device)
        self.position = torch.tensor([PROMPT], device=device)
        self._forward(
            torch.ones(batch, PROMPT, dtype=torch.long, device=device),
            torch.arange(PROMPT, device=device),
        )

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            tokens,
            past_key_values=self.cache,
            position_ids=positions.unsqueeze(0),
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def step(self) -> None:
        """Appends one token to every sequence."""
        logits = self._forward(self.tokens, self.position)
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1


def ways_to_run(step: Callable[[], None], on_gpu: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "eager", step
    if on_gpu:
        yield "graph", captured(step)


def seconds(step: Callable[[], None], steps: int, device: str) -> float:
    """Returns the time of one step, from `steps` of them in a row."""
    step()
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - start) / steps


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "generate.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--size", default="1b", choices=SIZES)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    config = LlamaConfig(**SIZES[args.size], tie_word_embeddings=True, attn_implementation="sdpa")
    with torch.device(args.device):
        dense = LlamaForCausalLM(config).eval()
    record = Record(args.device)
    reference = {}
    on_gpu = args.device == "cuda"
    others = 0  # bytes on the device that the measured model does not need
    for name in ("bf16", "nf4", "nf4 nested"):
        model = dense if name == "bf16" else packed(dense, args.device, nested="nested" in name)
        size = sum(t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor))
        for batch in map(int, args.batches.split(",")):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            generation = Generation(model, batch, PROMPT + 4 * args.steps + 8)
            for mode, step in ways_to_run(generation.step, on_gpu):
                each = seconds(step, args.steps, args.device)
                peak = torch.cuda.max_memory_allocated() - others if on_gpu else 0
                base = reference.setdefault((batch, mode), each)
                record.add(
                    f"generate/{args.size}/{name}/batch{batch}/{mode}",
                    1e3 * each,
                    tokens_per_s=batch / each,
                    times_bf16=base / each,
                    model_mb=size / 1e6,
                    **({"peak_mb": peak / 1e6} if on_gpu else {}),
                )
            del generation, step
        if model is dense:
            others = sum(t.nbytes for t in dense.parameters())
        del model
        gc.collect()
    record.write(args.out)


if __name__ == "__main__":
    main()
