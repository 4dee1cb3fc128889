# SPDX-License-Identifier: MIT
"""Steps of buckets that return: what stays the same is checked once and kept natively.

A list of tensors costs an op about 0.4 us per tensor, and a step takes up to six lists. A plan
holds all of them but the gradients on the native side (``csrc/ops/step_plan.h``). Before a step it
only makes sure, without a torch op, that gradients are in order and that parameters and states
still lie where they did (``csrc/bindings/step_plan.cpp``). Where that is not so, nothing is
written, and the op takes the step as if there were no plan. States that nobody but the optimizer
has ever had cannot move, and are not looked at. Percentile clipping, which looks at every gradient
before the step, is part of it: the histories of norms are kept like states.
"""

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

from .. import _library

__all__ = ["StepPlan"]

LONGEST_WAIT = 1024  # steps
NO_PERCENTILE = 100
NO_SCALES = (None, None, None, None)


def _is_observed() -> bool:
    """Whether someone wants to see ops: a tracer, or a mode that may replace them."""
    return (
        torch.compiler.is_compiling()
        or _python_dispatch.any_torch_dispatch_mode_on_stack()
        # The mode of torch.set_default_device replaces no op of ours.
        or not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )


class StepPlan:
    """Takes the steps of one list of parameters, where a plan serves.

    A plan is made in the second step, since many lists have only one. When parameters or states
    have moved, the next plan is made after 1, 2, 4, ... steps: making one costs as much as a step.

    Args:
        params: The parameters.
        state1: Their first states.
        state2: Their second states, or none.
        absmax1: The scales of the first states, or none.
        absmax2: The scales of the second states, or none.
        qmap1: The levels of the first states, or None.
        qmap2: The levels of the second states, or None.

    Attributes:
        watched: Whether others may have states, and give them other memory.
    """

    def __init__(
        self,
        params: list[Tensor],
        state1: list[Tensor],
        state2: list[Tensor],
        absmax1: list[Tensor],
        absmax2: list[Tensor],
        qmap1: Tensor | None,
        qmap2: Tensor | None,
    ):
        self._lists = (params, state1, state2, absmax1, absmax2, qmap1, qmap2)
        # Where blocks of threads count; made here, where no CUDA graph is captured.
        device = params[0].device
        self._tickets = torch.zeros(1 + len(params), dtype=torch.int32, device=device)
        self.watched = True
        self._rule: str | None = None
        self._clips = self._watches = False
        self._native = None
        self._countdown = 1
        self._wait = 1

    def take(
        self,
        rule: str,
        grads: list[Tensor],
        options: tuple,
        percentile: int = NO_PERCENTILE,
        histories: list[Tensor] | None = None,
        scales: tuple[Tensor | None, ...] = NO_SCALES,
    ) -> bool:
        """Takes a step and counts it, or returns False, having written nothing.

        Args:
            rule: Name of the update rule.
            grads: The gradient of each parameter.
            options: The last arguments of every optimizer op, as the schemas order them.
            percentile: Of percentile clipping, which goes before the step; 100: none.
            histories: The squares of past gradient norms that it takes, the same in every step.
            scales: Of states with one scale per tensor, the same in every step: the scales of both
                states before the step, and room for those after it, which become the former.
        """
        if _is_observed():
            return False
        clips = percentile < NO_PERCENTILE
        fits = rule == self._rule and clips <= self._clips and self.watched <= self._watches
        if self._native is None or not fits:
            if self._countdown > 0:
                self._countdown -= 1
                return False
            kept = histories if clips else []
            beside = (*scales, options[0], self._tickets, kept, self.watched)
            self._native = _make(rule, *self._lists, *beside)
            self._rule, self._clips, self._watches = rule, clips, self.watched
        if self._native is not None:
            if self._native.take(grads, options, percentile):
                return True
            if not self._native.stale:
                return False
            self._native = None
        self._countdown = self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT)
        return False


def _make(rule: str, params: list[Tensor], state1: list[Tensor], *rest):
    """Returns the native plan, or None where there is none."""
    device = params[0].device.type
    library = next((x for x in _library.libraries.values() if x.serves == device), None)
    if (
        library is None
        or not library.loaded
        or not hasattr(Tensor, "__dlpack_c_exchange_api__")  # torch may be too old
        # Subclasses may have no memory of their own.
        or any(type(p) not in (Tensor, nn.Parameter) or p.is_neg() for p in params)
        or any(type(s) is not Tensor for s in state1)
    ):
        return None
    module = _library.native_module()
    number = torch.ops.bitsandbytes._optimizer_plan(rule, params, state1, *rest)
    if number == 0:
        return None
    return module.StepPlan(str(library.path), number, Tensor, tuple(params))
