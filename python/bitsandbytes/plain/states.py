# SPDX-License-Identifier: MIT
"""States of optimizers as their rules see them, whatever they are stored as, in plain PyTorch.

Three states lie in two tensors: the first has two rows.
"""

import torch
import torch.nn.functional
from torch import Tensor

from .quantize import dequantize_blocks, quantize_blocks
from .rules import Rule

__all__ = ["BLOCK", "Blocks", "Floats", "Whole", "state_rows", "state_tensors"]

# Elements that share one absmax in 8-bit states; fixed by the checkpoint format.
BLOCK = 256


def state_tensors(rule: Rule) -> int:
    """Tensors that hold a parameter's states."""
    return min(rule.states, 2)


def state_rows(rule: Rule, k: int) -> int:
    """States in tensor k."""
    return 2 if rule.states == 3 and k == 0 else 1


class Floats:
    """States in float32."""

    bad_gradients_are_dropped = False

    def __init__(self, rule: Rule, lists: tuple[list[Tensor], ...]):
        self.lists = lists[: state_tensors(rule)]
        self.rows = [state_rows(rule, k) for k in range(len(self.lists))]

    def read(self, i: int) -> list[Tensor]:
        """Returns the states of tensor i, float32 [n] each."""
        return [
            row.clone()
            for tensors, rows in zip(self.lists, self.rows, strict=True)
            for row in tensors[i].reshape(rows, -1)
        ]

    def write(self, i: int, states: list[Tensor], grad: Tensor | None) -> None:
        """Stores the states of tensor i; `grad` only if elements of zero gradient stand still."""
        rest = iter(states)
        for tensors, rows in zip(self.lists, self.rows, strict=True):
            joined = torch.stack([next(rest) for _ in range(rows)])
            tensors[i].copy_(joined.view(tensors[i].shape))


class Blocks:
    """8-bit codes with one absmax per block."""

    bad_gradients_are_dropped = True

    def __init__(self, rule: Rule, packs: tuple):  # of codes, absmax, qmap
        self.packs = packs[: state_tensors(rule)]
        self.rows = [state_rows(rule, k) for k in range(len(self.packs))]

    def _places(self, i: int):
        """Yields codes [n], absmax [blocks] and qmap of each state of tensor i."""
        for (codes, absmax, qmap), rows in zip(self.packs, self.rows, strict=True):
            for row in range(rows):
                yield (
                    codes[i].view(rows, -1)[row] if rows > 1 else codes[i],
                    absmax[i].view(rows, -1)[row] if rows > 1 else absmax[i],
                    qmap,
                )

    def read(self, i: int) -> list[Tensor]:
        """Returns the states of tensor i, float32 [n] each."""
        return [
            dequantize_blocks(codes.reshape(-1), absmax.reshape(-1), qmap, BLOCK)
            for codes, absmax, qmap in self._places(i)
        ]

    def write(self, i: int, states: list[Tensor], grad: Tensor | None) -> None:
        """Stores the states of tensor i; `grad` only if elements of zero gradient stand still."""
        for (codes, absmax, qmap), state in zip(self._places(i), states, strict=True):
            new, scales = quantize_blocks(state, qmap, BLOCK, keep_sign=True)
            if grad is not None:
                # Codes that mean the same numbers again would still lose a little each time.
                idle = _idle_blocks(grad)
                scales = torch.where(idle, absmax.reshape(-1), scales)
                same = idle.repeat_interleave(BLOCK)[: grad.numel()]
                new = torch.where(same, codes.reshape(-1), new)
            codes.copy_(new.view(codes.shape))
            absmax.copy_(scales.view(absmax.shape))


class Whole:
    """8-bit codes with one absmax per tensor."""

    bad_gradients_are_dropped = True

    def __init__(self, rule: Rule, packs: tuple):  # of codes, max, new max, qmap
        self.packs = [
            (codes, most.reshape(-1), new_most.view(-1), qmap)
            for codes, most, new_most, qmap in packs[: rule.states]
        ]

    def read(self, i: int) -> list[Tensor]:
        """Returns the states of tensor i, float32 [n] each."""
        return [qmap[codes[i].reshape(-1).long()] * most[i] for codes, most, _, qmap in self.packs]

    def write(self, i: int, states: list[Tensor], grad: Tensor | None) -> None:
        """Stores the states of tensor i; `grad` only if elements of zero gradient stand still."""
        for (codes, most, new_most, qmap), state in zip(self.packs, states, strict=True):
            n = state.numel()
            if n == 0:
                new_most[i] = most[i]
                continue
            new, scale = quantize_blocks(state, qmap, n, keep_sign=True)
            if grad is not None:
                idle = (grad == 0).all()
                scale = torch.where(idle, most[i], scale)
                new = torch.where(idle, codes[i].reshape(-1), new)
            codes[i].copy_(new.view(codes[i].shape))
            new_most[i] = scale.squeeze()


def _idle_blocks(grad: Tensor) -> Tensor:
    """Blocks of a flat gradient in which every element is zero."""
    padded = torch.nn.functional.pad(grad, (0, -grad.numel() % BLOCK))
    return (padded.view(-1, BLOCK) == 0).all(dim=1)
