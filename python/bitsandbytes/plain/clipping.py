# SPDX-License-Identifier: MIT
"""Adaptive gradient clipping by a percentile of past norms, in plain PyTorch."""

import torch
from torch import Tensor

from .._checks import FLOATS, check, check_device, check_dtype, check_numel
from .._ops import register_kernel

__all__ = ["HISTORY"]

# Norms that are remembered.
HISTORY = 100


@register_kernel("percentile_clipping_step", "default")
@torch.no_grad()
def percentile_clipping_step(
    grads: list[Tensor], gnorm_vec: list[Tensor], step: Tensor, percentile: int
) -> Tensor:
    op = "percentile_clipping_step"
    count = len(grads)
    check(count > 0, op, "grads", "a list of at least one tensor", "an empty list")
    check(len(gnorm_vec) == count, op, "gnorm_vec", f"a list of {count}", len(gnorm_vec))
    check(0 <= percentile < HISTORY, op, "percentile", f"in [0, {HISTORY})", percentile)
    check_dtype(op, "grads", grads[0], *FLOATS)
    check_dtype(op, "step", step, torch.int64)
    check_numel(op, "step", step, 1, "the number of steps")
    for i, (grad, history) in enumerate(zip(grads, gnorm_vec, strict=True)):
        check_dtype(op, f"grads[{i}]", grad, grads[0].dtype)
        check_device(op, f"grads[{i}]", grad, "grads[0]", grads[0])
        check_dtype(op, f"gnorm_vec[{i}]", history, torch.float32)
        check_numel(op, f"gnorm_vec[{i}]", history, HISTORY, "norms")
        check_device(op, f"gnorm_vec[{i}]", history, "its gradient", grad)
    number = int(step.item()) + 1
    columns = []
    for grad, history in zip(grads, gnorm_vec, strict=True):
        squares = grad.float().square().sum()
        finite = squares.isfinite()
        first = (history == 0).all() | (number == 1)
        recorded = torch.where(first, squares, history)
        recorded.view(-1)[number % HISTORY] = squares
        # A norm that is not finite says nothing of those to come.
        history.copy_(torch.where(finite, recorded, history))
        norm, clip = squares.sqrt(), history.view(-1).sort().values[percentile].sqrt()
        factor = torch.where(finite & (norm > clip), clip / norm, torch.ones_like(norm))
        columns.append(torch.stack((norm, clip, factor)))
    return torch.stack(columns, dim=1)
