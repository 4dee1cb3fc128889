# SPDX-License-Identifier: MIT
"""Lists of parameters that advance together, and the native call that advances them."""

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import paged
from ..plain.optimizer import bounded_scale
from . import sharding
from .lists import all_are, gradients
from .plan import StepPlan

__all__ = ["NORM_HISTORY", "PER_PARAMETER", "Bucket", "learning_rate"]

NORM_HISTORY = 100  # gradient norms that percentile clipping remembers

# State entries that are one number per parameter.
PER_PARAMETER = ("max1", "new_max1", "max2", "new_max2", "unorm_vec")


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on the current stream of `device`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def learning_rate(lr: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """Returns a learning rate as an op takes it: a number, or a tensor on `device`."""
    if not isinstance(lr, Tensor):
        return lr, None
    if lr.device == device:
        return 0.0, lr if lr.dtype is torch.float64 else lr.to(torch.float32)
    return float(lr), None


def _derived_seed(seed: int, gindex: int, pindex: int) -> int:
    """A seed for the bucket that starts with this parameter (the finaliser of SplitMix64)."""
    mask = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15 * (1 + pindex + (gindex << 32))) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) - 2**63  # the range of a signed integer


class Bucket:
    """Parameters of the same group, overrides, dtype, device, kind of state and step number.

    The number of the step lives in a tensor beside the parameters, where a captured CUDA graph
    advances it too; the Python integers in ``state[p]["step"]`` are written only when looked at.
    What is one number per parameter lies in one tensor per bucket, of which the states hold views
    of one element.

    Args:
        group: The parameter group.
        override: Settings of these parameters that differ from the group's, or None.
        places: Of each parameter: index of its group, and its index in the group.
        params: The parameters.
        states: The state of each.
    """

    def __init__(
        self,
        group: dict,
        override: dict | None,
        places: list[tuple[int, int]],
        params: list[Tensor],
        states: list[dict[str, Any]],
    ):
        self.group = group
        self.override = override
        self.places = places
        self.split = sharding.split_of(params[0])
        self.sharded = any(map(sharding.is_dtensor, params))
        self.flattened = any(map(sharding.is_flattened, params))
        self._hold(params, states)
        self.steps = states[0]["step"]
        self.step_tensor = torch.full((), self.steps, dtype=torch.int64, device=self.device)
        self.captured = False
        self.compiled = False  # compiled code advances the tensor, too
        self._pending = False
        self._vectors: dict[str, Tensor] = {}
        self._histories: list[Tensor] = []
        self._pages: list[int] | None = None
        self._residency = paged.Residency()
        lists = (self.state1, self.state2, self.absmax1, self.absmax2, self.qmap1, self.qmap2)
        self._plan = None if self.sharded else StepPlan(params, *lists)

    def _hold(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        """Takes parameters, and the lists of what their states hold."""
        self.params = params
        self.states = states
        self.device = params[0].device
        first = states[0]
        self.eight_bit = first["state1"].dtype == torch.uint8
        self.state1 = self._entries("state1")
        self.state2 = self._entries("state2")
        self.absmax1 = self._entries("absmax1")
        self.absmax2 = self._entries("absmax2")
        self.qmap1 = first.get("qmap1")
        self.qmap2 = first.get("qmap2")
        self.tensor_wise = self.eight_bit and not self.absmax1  # one scale per tensor

    def _entries(self, key: str) -> list[Tensor]:
        entries = [state[key] for state in self.states] if key in self.states[0] else []
        return [sharding.local(entry) for entry in entries] if self.sharded else entries

    # ---- What lies beside the states ------------------------------------------------------------

    def watch(self, watched: bool) -> None:
        """Says whether anybody but the optimizer may have a tensor of the states."""
        if self._plan is not None:
            self._plan.watched = watched

    def gradients(self) -> list[Tensor | None]:
        """Returns the gradient of each parameter."""
        return gradients(self.params)

    def vector(self, key: str) -> Tensor:
        """Returns the numbers of state entry `key` [count]; zeros where a state had none."""
        found = self._vectors.get(key)
        if found is None:
            self._refuse_capture(key)
            zero = torch.zeros(1, dtype=torch.float32, device=self.device)
            found = torch.cat([state.get(key, zero).reshape(1) for state in self.states])
            for state, view in zip(self.states, found.split(1), strict=True):
                state[key] = view
            self._vectors[key] = found
        return found

    def vectors(self) -> dict[str, Tensor]:
        """Returns the vectors of state entries that have been asked for."""
        return self._vectors

    def histories(self) -> list[Tensor]:
        """Returns the squares of past gradient norms, float32 [100] per parameter."""
        if not self._histories:
            self._refuse_capture("gnorm_vec")
            # Before the first step the op fills the history. Later on, slots that were never
            # written must not look like gradients of zero.
            unknown = 0.0 if self.steps == 0 else float("inf")
            for state in self.states:
                if "gnorm_vec" not in state:
                    state["gnorm_vec"] = torch.full(
                        (NORM_HISTORY,), unknown, dtype=torch.float32, device=self.device
                    )
            self._histories = self._entries("gnorm_vec")
        return self._histories

    def complete(self, config: dict[str, Any]) -> None:
        """Creates the entries beside the states that steps with these settings need."""
        if config["percentile_clipping"] < 100:
            self.histories()
        if self.tensor_wise:
            self._whole_scales("max")
            self._whole_scales("new_max")
        if config["max_unorm"] > 0.0:
            self.vector("unorm_vec")

    def _refuse_capture(self, key: str) -> None:
        if _is_capturing(self.device):
            raise RuntimeError(
                f"step: state entry {key} must exist before a CUDA graph is captured, take one "
                "step eagerly first"
            )

    # ---- Step -----------------------------------------------------------------------------------

    def step(self, rule: str, config: dict[str, Any], grads: list[Tensor]) -> None:
        """Advances every parameter by its gradient.

        Args:
            rule: Name of the update rule.
            config: Settings, as ``Optimizer8bit.get_config`` returns them.
            grads: The gradients.
        """
        percentile, histories = 100, None
        if config["percentile_clipping"] < 100:
            percentile, histories = int(config["percentile_clipping"]), self.histories()
        options = self._options(config)
        if not self._step_by_plan(rule, grads, options, percentile, histories):
            self._step_by_ops(rule, grads, options, percentile, histories)
            self.step_tensor.add_(1)
        self.steps += 1
        self._pending = True
        self.captured = self.captured or _is_capturing(self.device)

    def _step_by_plan(self, rule: str, grads: list[Tensor], options: tuple, *clipping) -> bool:
        if self._plan is None:
            return False
        if not self.tensor_wise:
            return self._plan.take(rule, grads, options, *clipping)
        scales = (*self._whole_scales("max"), *self._whole_scales("new_max"))
        return self._plan.take(rule, grads, options, *clipping, scales)

    def _step_by_ops(
        self,
        rule: str,
        grads: list[Tensor],
        options: tuple,
        percentile: int,
        histories: list[Tensor] | None,
    ) -> None:
        ops = torch.ops.bitsandbytes
        params = self.params
        if self.sharded:
            params, grads = sharding.local_lists(params, grads)
        if histories is not None:
            # The norm of a norm is that norm.
            whole = grads if self.split is None else sharding.gradient_norms(self.split, grads)
            norms = ops.percentile_clipping_step(whole, histories, self.step_tensor, percentile)
            *rest, _, unorm = options
            options = (*rest, norms[2], unorm)
        lists = (rule, params, grads, self.state1, self.state2)
        if self.split is not None:
            options = self._bounded_as_wholes(lists, options)
        if not self.eight_bit:
            ops.optimizer_step_32bit(*lists, *options)
        elif self.absmax1:
            qmaps = (self.qmap1, self.qmap2)
            ops.optimizer_step_8bit_blockwise(*lists, self.absmax1, self.absmax2, *qmaps, *options)
        else:
            self._step_tensor_wise(lists, options)

    def prefetch(self) -> None:
        """Brings paged states to the device, in the order of its current stream."""
        if self._pages is None:
            self._pages = paged.pages_of([*self.state1, *self.state2])
        if self._pages and self._residency.may_be_lost(self.device):
            paged.prefetch_pages(self._pages, self.device)

    def _step_tensor_wise(self, lists: tuple, options: tuple) -> None:
        old, new = self._whole_scales("max"), self._whole_scales("new_max")
        torch.ops.bitsandbytes.optimizer_step_8bit(
            *lists, *old, *new, self.qmap1, self.qmap2, *options
        )
        # By value: a captured graph reads and writes the same addresses every time.
        for to, value in zip(old, new, strict=True):
            if to is not None:
                to.copy_(value)

    def _whole_scales(self, key: str) -> list[Tensor | None]:
        return [self.vector(f"{key}1"), self.vector(f"{key}2") if self.state2 else None]

    def _bounded_as_wholes(self, lists: tuple, options: tuple) -> tuple:
        """Returns options with factors that bound whole tensors instead of their parts."""
        *hyper, max_unorm, seed, gnorm_scales, unorm = options
        if max_unorm <= 0.0:
            return options
        ops, rest = torch.ops.bitsandbytes, (*hyper, gnorm_scales)
        qmaps = (self.qmap1, self.qmap2)
        if not self.eight_bit:
            squares = ops.optimizer_preview_32bit(*lists, *rest)
        elif self.absmax1:
            scales = (self.absmax1, self.absmax2)
            squares = ops.optimizer_preview_8bit_blockwise(*lists, *scales, *qmaps, *rest)
        else:
            scales = self._whole_scales("max")
            squares = ops.optimizer_preview_8bit(*lists, *scales, *qmaps, *rest)
        param_squares, update_squares = sharding.sum_of_parts(self.split, squares)
        unorm.copy_(update_squares)
        factors = bounded_scale(param_squares, update_squares, max_unorm)
        return (*hyper, 0.0, seed, gnorm_scales, None, factors)

    def _options(self, config: dict[str, Any]) -> tuple:
        lr, lr_tensor = learning_rate(config["lr"], self.device)
        betas = config["betas"]
        max_unorm = config["max_unorm"]
        seed = config["rounding_seed"]
        if seed is not None and self.params[0].dtype is torch.bfloat16:
            seed = _derived_seed(seed, *self.places[0])
            # Replicas round alike, parts do not.
            for coordinate in self.split.part() if self.split is not None else ():
                seed = _derived_seed(seed, 0, coordinate)
        else:
            seed = None
        return (
            self.step_tensor,
            lr_tensor,
            lr,
            betas[0],
            betas[1],
            betas[2] if len(betas) > 2 else 0.0,
            config["alpha"],
            config["eps"],
            config["weight_decay"],
            1.0,
            bool(config["skip_zeros"]),
            float(config["t_alpha"] or 0.0),
            float(config["t_beta3"] or 0.0),
            max_unorm,
            seed,
            None,
            self.vector("unorm_vec") if max_unorm > 0.0 else None,
        )

    # ---- Between steps --------------------------------------------------------------------------

    def write_steps(self) -> None:
        """Brings ``state["step"]`` of every member up to date."""
        if self.captured or self.compiled:
            # A graph advanced the tensor without this process counting.
            steps = int(self.step_tensor.item())
            self._pending = self._pending or steps != self.steps
            self.steps = steps
        if self._pending:
            for state in self.states:
                state["step"] = self.steps
            self._pending = False

    def serves(self, other: "Bucket") -> bool:
        """Whether this bucket, made earlier, may stand for `other` as it is."""
        return (
            self.group is other.group
            and self.override == other.override
            and self.places == other.places
            and self.steps == other.steps
            and all_are(self.params, other.params)
            and all_are(self.states, other.states)
            and all_are(self.tensors(), other.tensors())
            and all(
                state.get(key) is not None and state[key].data_ptr() == view.data_ptr()
                for key, vector in self._vectors.items()
                for state, view in zip(self.states, vector.split(1), strict=True)
            )
        )

    def tensors(self) -> list[Tensor]:
        """Returns every tensor of the states that stands in a list."""
        lists = (self.state1, self.state2, self.absmax1, self.absmax2, [self.qmap1, self.qmap2])
        return list(itertools.chain(*lists))
