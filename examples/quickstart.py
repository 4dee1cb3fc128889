# SPDX-License-Identifier: MIT
"""Quickstart: teach a sentence encoder to find Python functions, in 32 bits and in 8 bits.

A trained MiniLM encoder (22.6 million parameters) learns to find a function of the standard
library by its description. It is fine-tuned twice from the same weights on the same batches,
with `torch.optim.AdamW` and with `bnb.optim.AdamW8bit`; the second model then has its linear
layers replaced by `bnb.nn.Linear8bitLt`. One table and one picture compare accuracy and memory.

    python examples/quickstart.py --out out
"""

import argparse
import ast
import copy
import random
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from minilm import load_pretrained, load_tokenizer, pad
from torch import Tensor, nn
from tqdm import tqdm

import bitsandbytes as bnb

HELD_OUT = 1000  # functions kept for the score
MAX_TOKENS = 32  # enough for nine texts in ten
CHUNK = 32  # texts encoded together; they have similar lengths, so little padding is computed
TEMPERATURE = 0.05
SMOOTHED = 15  # steps; the loss of a single batch says more about the batch than the model
SEED = 0

# What this script promises; main() fails when a measurement disagrees.
MAX_GAP = 2.0  # percentage points between the scores in 8 and in 32 bits
MAX_STATE_RATIO = 0.27  # optimizer bytes in 8 bits over those in 32 bits
MIN_COSINE = 0.999  # of a text's vectors by the int8 layers and by those they were made of


class Pair(NamedTuple):
    """One function of the standard library, as token ids."""

    signature: list[int]
    description: list[int]


@dataclass
class Row:
    """One line of the table; None where the column has no meaning."""

    name: str
    before: float | None  # top-1 accuracy, 0 to 1
    after: float | None
    model_bytes: int
    state_bytes: int | None = None
    step_seconds: float | None = None  # forward, backward and optimizer
    optimizer_seconds: float | None = None  # the part of it spent in optimizer.step()
    losses: list[float] = field(default_factory=list)


# ---- Data: signatures and descriptions from the sources of the standard library ----


def documented_functions(body: Iterable[ast.stmt], owner: str = "") -> Iterator[tuple[str, str]]:
    """Yields (signature, first docstring paragraph) of functions and methods below `body`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            arguments = re.sub(r"^(self|cls)\b(, )?", "", ast.unparse(node.args))
            yield f"{owner}{node.name}({arguments})", " ".join(paragraph.split())
        elif isinstance(node, ast.ClassDef):
            yield from documented_functions(node.body, f"{owner}{node.name}.")
        else:  # an `if` or a `try` may hold definitions too
            yield from documented_functions(getattr(node, "body", ()), owner)


def read_standard_library() -> list[tuple[str, str]]:
    """Collects the described functions, without duplicates, in an order that never changes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [p for p in sorted(root.rglob("*.py")) if skipped.isdisjoint(p.relative_to(root).parts)]
    found, seen = [], set()
    for path in tqdm(files, desc="reading the standard library", unit="file"):
        for signature, description in documented_functions(ast.parse(path.read_bytes()).body):
            # Left out: repeated descriptions and those of one or two words, which no search
            # could attribute to a single function.
            if len(description.split()) > 2 and seen.isdisjoint((signature, description)):
                seen.update((signature, description))
                found.append((signature, description))
    random.Random(SEED).shuffle(found)
    return found


def load_pairs() -> tuple[list[Pair], list[Pair]]:
    """Returns the tokenized pairs for training and the held-out ones for the score."""
    tokenizer = load_tokenizer(MAX_TOKENS)
    columns = zip(*read_standard_library(), strict=True)
    ids = ([text.ids for text in tokenizer.encode_batch(column)] for column in columns)
    pairs = [Pair(*pair) for pair in zip(*ids, strict=True)]
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


# ---- Model: encode, train, score ----


def encode(model: nn.Module, texts: list[list[int]], progress: str | None = None) -> Tensor:
    """Encodes tokenized texts as unit vectors [len(texts), width], in the order given."""
    device = next(model.parameters()).device
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    chunks = [by_length[i : i + CHUNK] for i in range(0, len(texts), CHUNK)]
    bar = tqdm(chunks, desc=progress, unit="chunk", disable=progress is None)
    vectors = torch.cat([model(pad([texts[i] for i in chunk], device)) for chunk in bar])
    return vectors[torch.tensor(by_length).argsort().to(device)]


@torch.no_grad()
def top1_accuracy(model: nn.Module, pairs: list[Pair], name: str) -> float:
    """Measures the share of descriptions whose nearest signature is their own function."""
    texts = [p.signature for p in pairs] + [p.description for p in pairs]
    signatures, descriptions = encode(model, texts, f"scoring {name}").chunk(2)
    nearest = (descriptions @ signatures.T).argmax(dim=1)
    return (nearest == torch.arange(len(pairs), device=nearest.device)).float().mean().item()


@torch.no_grad()
def mean_cosine(model: nn.Module, other: nn.Module, pairs: list[Pair]) -> float:
    """Compares the vectors of two encoders, text by text."""
    texts = [p.signature for p in pairs] + [p.description for p in pairs]
    return (encode(model, texts) * encode(other, texts)).sum(dim=1).mean().item()


def contrastive_loss(model: nn.Module, pairs: list[Pair]) -> Tensor:
    """Asks each signature for its description and back, among all those of the batch."""
    texts = [p.signature for p in pairs] + [p.description for p in pairs]
    signatures, descriptions = encode(model, texts).chunk(2)
    logits = signatures @ descriptions.T / TEMPERATURE
    target = torch.arange(len(pairs), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train(
    pretrained: nn.Module,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    batches: list[list[Pair]],
    lr: float,
    row: Row,
) -> nn.Module:
    """Fine-tunes a copy of `pretrained` and records losses, times and bytes in `row`."""
    model = copy.deepcopy(pretrained)
    optimizer = make_optimizer(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    step_seconds, optimizer_seconds = [], []
    bar = tqdm(batches, desc=f"training with {row.name}", unit="step")
    for batch in bar:
        start = now()
        loss = contrastive_loss(model, batch)
        loss.backward()
        before_update = now()
        optimizer.step()
        end = now()
        optimizer.zero_grad()
        schedule.step()
        step_seconds.append(end - start)
        optimizer_seconds.append(end - before_update)
        row.losses.append(loss.item())
        bar.set_postfix(loss=f"{row.losses[-1]:.3f}")
    # Medians, because the first steps also allocate memory and warm up caches.
    row.step_seconds = statistics.median(step_seconds)
    row.optimizer_seconds = statistics.median(optimizer_seconds)
    row.state_bytes = optimizer_bytes(optimizer)
    return model


def with_linears(model: nn.Module, make: Callable[[int, int, bool], nn.Module]) -> nn.Module:
    """Returns a copy of `model` in which ``make(inputs, outputs, bias)`` replaces linear layers."""
    device = next(model.parameters()).device
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                layer = make(linear.in_features, linear.out_features, linear.bias is not None)
                layer.load_state_dict(linear.state_dict())
                setattr(parent, name, layer.to(device))  # the move quantizes the weight
    return model


def with_int8_linears(model: nn.Module) -> nn.Module:
    """Returns a copy of `model` whose linear layers compute in 8 bits: LLM.int8()."""
    make = partial(
        bnb.nn.Linear8bitLt,
        has_fp16_weights=False,
        threshold=6.0,  # input features beyond it are multiplied in floating point
    )
    return with_linears(model, make)


# ---- Measurements ----


def now() -> float:
    """Reads the clock in seconds, after the device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def model_bytes(model: nn.Module) -> int:
    """Sums what a checkpoint of `model` holds, including the scales of quantized weights."""
    return sum(t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor))


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Sums the optimizer's state; tensors shared by several parameters count once."""
    tensors = (t for state in optimizer.state.values() for t in state.values())
    return sum({t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor)}.values())


def blockwise_round_trip(weight: Tensor) -> str:
    """Quantizes one weight to 8 bits and back, and says what that costs and saves."""
    codes, state = bnb.functional.quantize_blockwise(weight)
    restored = bnb.functional.dequantize_blockwise(codes, state)
    error = ((restored - weight).norm() / weight.norm()).item()
    return (
        f"quantize_blockwise of one weight {tuple(weight.shape)}: {weight.nbytes:,} -> "
        f"{codes.nbytes + state.absmax.nbytes:,} bytes, relative round-trip error {error:.2%}"
    )


def broken_promises(exact: Row, adam8: Row, int8: Row, cosine: float) -> list[str]:
    """Returns a sentence for each promise that the measurements do not keep."""
    broken = [
        f"{row.name} scores {row.after:.1%}, more than {MAX_GAP:.0f} points away "
        f"from the {exact.after:.1%} of {exact.name}"
        for row in (adam8, int8)
        if 100 * abs(row.after - exact.after) > MAX_GAP
    ]
    if cosine < MIN_COSINE:
        broken.append(
            f"vectors of {int8.name} have a mean cosine of {cosine:.5f} with those of the layers "
            f"they were made of, less than {MIN_COSINE}"
        )
    if adam8.state_bytes > MAX_STATE_RATIO * exact.state_bytes:
        broken.append(
            f"{adam8.name} keeps {adam8.state_bytes / exact.state_bytes:.1%} of the optimizer "
            f"state of {exact.name}, more than {MAX_STATE_RATIO:.0%}"
        )
    return broken


# ---- Report ----


def format_table(rows: list[Row]) -> str:
    """Lays out the measurements, a line for each model."""

    def cell(value: float | None, scale: float, unit: str) -> str:
        return "-" if value is None else f"{value * scale:.1f} {unit}"

    header = ("", "top-1 before", "after", "optimizer state", "model", "step", "of it optimizer")
    lines = [header] + [
        (
            row.name,
            cell(row.before, 100, "%"),
            cell(row.after, 100, "%"),
            cell(row.state_bytes, 1e-6, "MB"),
            cell(row.model_bytes, 1e-6, "MB"),
            cell(row.step_seconds, 1e3, "ms"),
            cell(row.optimizer_seconds, 1e3, "ms"),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def draw(exact: Row, adam8: Row, int8: Row, path: Path) -> None:
    """Draws the loss curves beside the memory bars."""
    blue, orange, green = "#4477AA", "#EE7733", "#228833"  # distinct to colour-blind readers too
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    curves, bars = figure.subplots(1, 2)

    # The exact curve is the wider one below: both stay visible where they coincide.
    for row, color, width in ((exact, blue, 6.0), (adam8, orange, 1.8)):
        steps = range(1, len(row.losses) + 1)
        curves.plot(steps, row.losses, color=color, linewidth=width / 3, alpha=0.3)
        means = [statistics.mean(row.losses[max(0, step - SMOOTHED) : step]) for step in steps]
        curves.plot(steps, means, color=color, linewidth=width, label=row.name)
    curves.set(
        title=f"Training loss (faint: each batch, bold: mean of the last {SMOOTHED})",
        xlabel="step",
        ylabel="contrastive loss (nats)",
    )
    curves.set_ylim(bottom=0)
    curves.grid(axis="y", alpha=0.3)
    curves.legend(frameon=False, loc="upper right")

    measured = [
        (0.0, exact.state_bytes, blue, exact.name),
        (1.0, adam8.state_bytes, orange, adam8.name),
        (2.6, exact.model_bytes, blue, "nn.Linear"),
        (3.6, int8.model_bytes, green, "Linear8bitLt"),
    ]
    for position, size, color, name in measured:
        bar = bars.bar(position, size / 1e6, width=0.75, color=color, alpha=0.85)
        bars.bar_label(bar, labels=[f"{name}\n{size / 1e6:.1f} MB"], padding=3)
    bars.set(title="Memory", ylabel="megabytes (1 MB = 1 000 000 bytes)")
    bars.set_xticks([0.5, 3.1], ["optimizer state", "model"], fontsize=11)
    bars.tick_params(axis="x", length=0)
    bars.margins(y=0.15)

    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "Python functions found by their description (top-1 accuracy)\n"
        f"{exact.before:.1%} pretrained, {exact.after:.1%} {exact.name}, "
        f"{adam8.after:.1%} {adam8.name}, {int8.after:.1%} with {int8.name.removeprefix('+ ')}"
    )
    figure.savefig(path, dpi=150)


def main() -> int:
    """Runs the comparison; returns 1 when a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    parser.add_argument("--steps", type=int, default=50, help="training steps of each optimizer")
    parser.add_argument("--batch", type=int, default=32, help="pairs per step")
    parser.add_argument("--lr", type=float, default=1e-4, help="initial learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    training, held_out = load_pairs()
    print(f"{len(training)} functions to learn from, {len(held_out)} held out for the score")
    rng = random.Random(SEED)
    batches = [rng.sample(training, args.batch) for _ in range(args.steps)]

    model = load_pretrained().to(args.device)
    size, accuracy = model_bytes(model), top1_accuracy(model, held_out, "the pretrained model")
    pretrained = Row("pretrained", accuracy, None, size)

    # The two trainings differ in the optimizer's class and in nothing else.
    exact = Row("torch AdamW", accuracy, None, size)
    trained = train(model, torch.optim.AdamW, batches, args.lr, exact)
    exact.after = top1_accuracy(trained, held_out, exact.name)

    adam8 = Row("bnb AdamW8bit", accuracy, None, size)
    trained = train(model, bnb.optim.AdamW8bit, batches, args.lr, adam8)
    adam8.after = top1_accuracy(trained, held_out, adam8.name)

    quantized = with_int8_linears(trained)
    int8 = Row("+ Linear8bitLt", adam8.after, None, model_bytes(quantized))
    int8.after = top1_accuracy(quantized, held_out, int8.name)
    cosine = mean_cosine(trained, quantized, held_out[:200])

    print(f"\n{format_table([pretrained, exact, adam8, int8])}\n")
    print(blockwise_round_trip(trained.layers[0].expand.weight.detach()))
    print(f"vectors by Linear8bitLt and by nn.Linear: mean cosine {cosine:.5f}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(exact, adam8, int8, args.out / "quickstart.png")
    print(f"picture: {args.out / 'quickstart.png'}")

    broken = broken_promises(exact, adam8, int8, cosine)
    for sentence in broken:
        print(f"promise broken: {sentence}", file=sys.stderr)
    if not broken:
        print(
            f"promise kept: 8-bit scores within {MAX_GAP:.0f} points of 32-bit, with "
            f"{adam8.state_bytes / exact.state_bytes:.1%} of the optimizer state"
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
