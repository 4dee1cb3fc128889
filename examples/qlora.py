# SPDX-License-Identifier: MIT
"""QLoRA: the quickstart's task, with the encoder frozen in 4 bits and adapters that learn.

The linear layers of a trained MiniLM become `bnb.nn.LinearNF4` with double quantization; PEFT adds
low-rank adapters (LoRA) beside them, and nothing else is trained. The score is compared with that
of fine-tuning every weight in 32 bits on the same batches.

    pip install peft
    python examples/qlora.py
"""

import argparse
import random
import sys
from functools import partial

import torch
from minilm import load_pretrained
from peft import LoraConfig, get_peft_model
from quickstart import (
    MAX_GAP,
    SEED,
    Row,
    format_table,
    load_pairs,
    model_bytes,
    top1_accuracy,
    with_linears,
)
from quickstart import train as fine_tune
from torch import nn

import bitsandbytes as bnb


def with_4bit_linears(model: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
    """Returns a copy of `model` whose linear layers hold NF4 codes with quantized scales."""
    return with_linears(model, partial(bnb.nn.LinearNF4, compute_dtype=compute_dtype))


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Adds a LoRA adapter to every 4-bit layer and freezes everything else."""
    names = [n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    return get_peft_model(model, config)


def main() -> int:
    """Runs both trainings; returns 1 when the scores are too far apart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="training steps")
    parser.add_argument("--batch", type=int, default=32, help="pairs per step")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of all weights")
    parser.add_argument("--adapter-lr", type=float, default=1e-3, help="that of the adapters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(SEED)

    training, held_out = load_pairs()
    rng = random.Random(SEED)
    batches = [rng.sample(training, args.batch) for _ in range(args.steps)]
    model = load_pretrained().to(args.device)
    accuracy = top1_accuracy(model, held_out, "the pretrained model")

    full = Row("all weights, AdamW", accuracy, None, model_bytes(model))
    trained = fine_tune(model, torch.optim.AdamW, batches, args.lr, full)
    full.after = top1_accuracy(trained, held_out, full.name)

    dtype = torch.bfloat16 if args.device != "cpu" else torch.float32
    packed = with_4bit_linears(model, dtype)
    before = top1_accuracy(packed, held_out, "the 4-bit model")
    qlora = Row("4-bit weights, LoRA, AdamW8bit", before, None, model_bytes(packed))
    adapted = with_adapters(packed, args.rank)
    trained = fine_tune(adapted, bnb.optim.AdamW8bit, batches, args.adapter_lr, qlora)
    qlora.after = top1_accuracy(trained, held_out, qlora.name)

    learning = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    print(f"\n{format_table([full, qlora])}\n")
    total = sum(p.numel() for p in model.parameters())
    print(f"adapters: {learning:,} numbers; all weights: {total:,}")
    if qlora.after < full.after - MAX_GAP / 100:
        print(
            f"promise broken: {qlora.name} scores {qlora.after:.1%}, more than {MAX_GAP:.0f} "
            f"points below the {full.after:.1%} of {full.name}",
            file=sys.stderr,
        )
        return 1
    print(f"promise kept: QLoRA scores within {MAX_GAP:.0f} points of fine-tuning every weight")
    return 0


if __name__ == "__main__":
    sys.exit(main())
