# SPDX-License-Identifier: MIT
"""The step of an optimizer as ``torch.compile`` traces it.

Tracing reads parameters, gradients and states where they stand, in `param_groups` and `state`, so
that the guards of the compiled code see what a program changes there, and what is replaced by its
like needs no new code. Only what cannot be found there lies in a :class:`Layout`: which parameters
advance together, and the number of their step. Python integers that grow are not read: each would
be a constant of the compiled code.
"""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo import mark_static_address

from .buckets import Bucket
from .engine import Optimizer8bit

__all__ = ["Layout", "step"]

Place = tuple[int, int]  # index of a group, index of a parameter in it


class Section:
    """What a compiled step knows of one bucket besides parameters and states.

    Args:
        bucket: The bucket, of which eager steps make use in between.
        order: Index of every parameter in `optimizer.state`.
    """

    def __init__(self, bucket: Bucket, order: dict[Tensor, int]):
        self.override = bucket.override
        self.split = bucket.split
        self.sharded = bucket.sharded
        self.step_tensor = bucket.step_tensor
        self.vectors = bucket.vectors()
        self.params = bucket.params
        self.steps = bucket.steps  # as the states have it
        # One string: a guard compares it at once, and a list number by number. Compiled code finds
        # states by their order, which therefore is part of it.
        self.members = ",".join(
            f"{gindex}.{pindex}.{order[p]}"
            for (gindex, pindex), p in zip(bucket.places, bucket.params, strict=True)
        )

    def places(self) -> list[Place]:
        """Returns where each parameter stands."""
        parts = [member.split(".") for member in self.members.split(",")]
        return [(int(gindex), int(pindex)) for gindex, pindex, _ in parts]


class Layout:
    """The buckets of compiled steps, without their parameters and states.

    These may be replaced, moved or freed between two steps.

    Args:
        optimizer: The optimizer, whose buckets have been built.
    """

    def __init__(self, optimizer: Optimizer8bit):
        self.version = optimizer.mng.version
        order = {p: i for i, p in enumerate(optimizer._state)}
        self.sections = []
        for bucket in optimizer._buckets:
            bucket.complete(optimizer._merge_config(bucket.group, bucket.override))
            bucket.compiled = True
            self.sections.append(Section(bucket, order))
            # CUDA graphs write to tensors whose address stays; those they would copy otherwise.
            for tensor in (bucket.step_tensor, *bucket.vectors().values(), *bucket.tensors()):
                if isinstance(tensor, Tensor):
                    mark_static_address(tensor)
            # Compiled code uses the vector. A guard on the identity of its views tells whether
            # they are still what the states hold.
            for key in bucket.vectors():
                for state in bucket.states:
                    mark_static_address(state[key], guard=True)

    def places(self) -> set[Place]:
        """Returns where the parameters that advance stand."""
        return {place for section in self.sections for place in section.places()}

    def write_steps(self, states: dict[Tensor, dict[str, Any]]) -> None:
        """Brings ``states[p]["step"]`` of every member up to date."""
        for section in self.sections:
            steps = int(section.step_tensor.item())
            if steps == section.steps:
                continue
            section.steps = steps
            for p in section.params:
                if states.get(p):
                    states[p]["step"] = steps


class _TracedBucket(Bucket):
    """A bucket that lives in one compiled step."""

    def __init__(
        self, section: Section, group: dict[str, Any], params: list[Tensor], states: list[dict]
    ):
        self.group = group
        self.override = section.override
        self.places = section.places()
        self.split = section.split
        self.sharded = section.sharded
        self._hold(params, states)
        self.steps = 0  # step_tensor counts
        self.step_tensor = section.step_tensor
        self.captured = self.compiled = True
        self._pending = False
        self._plan = None
        self._vectors = section.vectors
        self._histories = self._entries("gnorm_vec")


def step(optimizer: Optimizer8bit) -> None:
    """Takes one step, in Python that ``torch.compile`` turns into one graph.

    Args:
        optimizer: The optimizer.
    """
    groups = optimizer.param_groups
    places = tuple(
        (gindex, pindex)
        for gindex, group in enumerate(groups)
        for pindex, p in enumerate(group["params"])
        if p.grad is not None
    )
    optimizer._lay_out(places)
    layout = optimizer._layout
    if layout is None or layout.version != optimizer.mng.version:
        # Never; the comparison becomes a guard of the compiled code.
        raise RuntimeError("step: overrides changed while the step was compiled")
    for section in layout.sections:
        where = section.places()
        params = [groups[gindex]["params"][pindex] for gindex, pindex in where]
        states = [optimizer._state[p] for p in params]
        bucket = _TracedBucket(section, groups[where[0][0]], params, states)
        for key in section.vectors:
            if any(state[key] is None for state in states):  # never; see Layout
                raise RuntimeError(f"step: state entry {key} is missing")
        config = optimizer._merge_config(bucket.group, bucket.override)
        config["lr"] = _as_tensor(config["lr"], bucket.device)
        bucket.step(optimizer.optimizer_name, config, bucket.gradients())


# A method, since torch before 2.12 passes no objects to functions of this kind.
torch.compiler.assume_constant_result(Optimizer8bit._lay_out)


def _as_tensor(lr: float | Tensor, device: torch.device) -> Tensor:
    """Returns a learning rate as a tensor on `device`: a number would be a constant of the code."""
    if isinstance(lr, Tensor):
        return lr.to(device)
    # A product, since the compiler keeps a number that changes as an input of products alone.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.ones((), dtype=dtype, device=device) * lr
