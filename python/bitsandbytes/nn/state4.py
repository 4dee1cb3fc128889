# SPDX-License-Identifier: MIT
"""What layers do with the state of packed 4-bit codes: read it, move it, give it other values."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.four_bit import check_state_4bit
from ..quant.state import QuantState

__all__ = [
    "are_codes_of",
    "copied",
    "copy_state",
    "is_state_entry",
    "move_state",
    "read_state",
    "stored_as",
    "target_of",
]

TENSORS = ("absmax", "code", "offset")
SETTINGS = ("shape", "dtype", "blocksize", "quant_type", "nested")


def read_state(entries: dict[str, Any], device: torch.device | str | int) -> QuantState:
    """Builds the state of a weight from what a checkpoint has for it, which stays as it is.

    Args:
        entries: As for :meth:`QuantState.from_dict`.
        device: Where the tensors go.

    Returns:
        The state, with scales in the order of the blocks.

    Raises:
        ValueError: There is not exactly one packed entry of a known type, or the entries do not
            fit each other.
        AssertionError: An entry is unknown.
        KeyError: An entry is missing.
    """
    state = QuantState.from_dict(dict(entries), device)
    if state.quant_type not in state.valid_quant_types:
        raise ValueError(
            f"Params4bit: quant_type must be one of {state.valid_quant_types}, "
            f"got {state.quant_type!r}"
        )
    if state.absmax.dim() == 2 and not state.nested:
        # Compat: what bitsandbytes 0.49 and 0.50 save after inference on a CPU with bfloat16
        # instructions: scales [blocks per row, rows].
        state.absmax = state.absmax.t().reshape(-1).float()
    check_state_4bit("Params4bit", state)
    # A checkpoint whose numbers were all cast to 16 bits.
    for part in (state, state.state2) if state.nested else (state,):
        if part.absmax.is_floating_point() and part.absmax.dtype != torch.float32:
            part.absmax = part.absmax.float()
        if part.levels().dtype != torch.float32:
            part.code = part.levels().float()
    return state


def move_state(state: QuantState, device: torch.device) -> QuantState:
    """Returns `state` on `device`: itself, moved in place, unless values go or come.

    On its way to "meta" the state is copied, so that its values stay with whoever holds them; one
    that comes from there gets memory without values.
    """
    if state.absmax.device == device:
        return state
    if state.absmax.is_meta or device.type == "meta":
        state = copy.copy(state)
        for name in TENSORS:
            value = getattr(state, name)
            if value is not None:
                setattr(state, name, torch.empty_like(value, device=device))
        if state.state2 is not None:
            state.state2 = move_state(state.state2, device)
    else:
        state.to(device)
    return state


def target_of(fn, device: torch.device) -> torch.device:
    """Returns where the function that torch.nn.Module applies moves tensors on `device`."""
    return fn(torch.empty(0, device=device)).device


def copy_state(state: QuantState, source: QuantState) -> None:
    """Gives `state` the values of `source`, in the memory that it has where they fit."""
    for name in TENSORS:
        own, value = getattr(state, name), getattr(source, name)
        if own is not None and value is not None and _alike(own, value):
            own.copy_(value)
        else:
            setattr(state, name, value)
    for name in SETTINGS:
        setattr(state, name, getattr(source, name))
    if state.state2 is None or source.state2 is None:
        state.state2 = source.state2
    else:
        copy_state(state.state2, source.state2)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def copied(entries: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a checkpoint with tensors of their own."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()}


def is_state_entry(key: str, weight: str) -> bool:
    """Whether `key` of a state dict belongs to the state of the parameter named `weight`."""
    field = key[len(weight) + 1 :].split(".")[0]
    return key.startswith(weight + ".") and field in QuantState.valid_qs_keys


def are_codes_of(state: QuantState, packed: Tensor, storage: torch.dtype | None = None) -> bool:
    """Whether a tensor ``[elements, 1]`` has as many bytes as the weight of `state` takes.

    With `storage`: whether it had, before its elements of that dtype were cast to another.
    """
    if packed.dim() != 2 or packed.shape[1] != 1:
        return False
    n, found = state.shape.numel(), packed.shape[0] * (storage or packed.dtype).itemsize
    # Some devices of the public package fill up the last block.
    return n <= found * 2 and found < -(-n // state.blocksize) * state.blocksize // 2 + 8


def stored_as(packed: Tensor, storage: torch.dtype) -> Tensor:
    """Returns the same bytes ``[elements, 1]`` in another dtype, filled up with zeros."""
    if packed.dtype == storage:
        return packed
    flat = packed.detach().reshape(-1).view(torch.uint8)
    flat = nn.functional.pad(flat, (0, -flat.numel() % storage.itemsize))
    return flat.view(storage).view(-1, 1)
