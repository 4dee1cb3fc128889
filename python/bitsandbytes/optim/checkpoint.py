# SPDX-License-Identifier: MIT
"""State dictionaries of optimizers: the format written, and every older one that is read.

| releases | layout |
|---|---|
| 0.49.2 and newer | tensors of a state in a dictionary of their own (`WRAPPER`) |
| 0.44 to 0.49.1 | tensors beside ``step`` |
| 0.43 and older | the same, blocks of 2048 elements |
| 0.41.0 and older | ``qmap2`` is another table; each state carries its own |
| up to 0.49, ``block_wise=False`` | ``max1``, ``max2`` instead of ``absmax1``, ``absmax2`` |
| AdEMAMix, written on CUDA | scales of the two averages overlap, see `_rows_of_scales` |
"""

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..plain.quantize import LEVELS, dequantize_blocks
from ..plain.states import BLOCK
from ..quant.codes import default_code
from . import sharding
from .buckets import NORM_HISTORY

__all__ = ["QUANT_STATE_KEYS", "WRAPPER", "StateReader", "nested", "read_state_dict"]

LEGACY_BLOCK = 2048
MOST_STEPS = 2**62  # which ops count in 64 bits
WRAPPER = "__bnb_optimizer_quant_state__"
QUANT_STATE_KEYS = frozenset(
    {
        "qmap1",
        "qmap2",
        "max1",
        "max2",
        "new_max1",
        "new_max2",
        "state1",
        "state2",
        "gnorm_vec",
        "absmax1",
        "absmax2",
        "unorm_vec",
    }
)


def nested(state: dict[str, Any], inner_keys: Collection[str]) -> dict[str, Any]:
    """Returns the state of one parameter as it is written, sharing its tensors."""
    inner = {key: value for key, value in state.items() if key in inner_keys}
    if not inner:
        return state
    outer = {key: value for key, value in state.items() if key not in inner}
    return {**outer, WRAPPER: inner}


def read_state_dict(
    state_dict: dict[str, Any],
    param_groups: list[dict[str, Any]],
    read: "StateReader",
    config: Callable[[int, int, dict[str, Any]], dict[str, Any]],
) -> tuple[defaultdict, list[dict[str, Any]]]:
    """Reads a checkpoint for the parameters of an optimizer.

    Args:
        state_dict: The checkpoint; not changed.
        param_groups: The groups of the optimizer.
        read: Reads the state of one parameter.
        config: Settings of a parameter, by its group's index, its own, and the group.

    Returns:
        States by parameter, and the new groups.

    Raises:
        ValueError: The checkpoint does not fit; the message names what does not.
    """
    # What is copied into other memory needs no copy before, which might not fit beside it.
    memo = {} if read.own_buffer is None else _state_tensors(state_dict)
    state_dict = copy.deepcopy(state_dict, memo)
    saved_groups = state_dict["param_groups"]
    if len(param_groups) != len(saved_groups):
        raise ValueError(
            f"load_state_dict: the checkpoint must have {len(param_groups)} parameter "
            f"groups, got {len(saved_groups)}"
        )
    for i, (group, saved) in enumerate(zip(param_groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"load_state_dict: group {i} of the checkpoint must have "
                f"{len(group['params'])} parameters, got {len(saved['params'])}"
            )
    saved_ids = (i for group in saved_groups for i in group["params"])
    parameters = (
        (p, functools.partial(config, gindex, pindex, group))
        for gindex, group in enumerate(param_groups)
        for pindex, p in enumerate(group["params"])
    )
    parameter_of = dict(zip(saved_ids, parameters, strict=True))

    states: defaultdict = defaultdict(dict)
    for key, value in state_dict["state"].items():
        if key not in parameter_of:
            states[key] = copy.deepcopy(value)
        else:
            parameter, settings = parameter_of[key]
            states[parameter] = read(key, parameter, value, settings)
    groups = [_merged(*pair) for pair in zip(param_groups, saved_groups, strict=True)]
    return states, groups


def _state_tensors(state_dict: dict[str, Any]) -> dict[int, Tensor]:
    """Returns `state1` and `state2` of every parameter by their id, as copy.deepcopy takes them."""
    entries = (
        holder[key]
        for state in state_dict["state"].values()
        for holder in (state, state.get(WRAPPER, {}))
        if "state1" in holder
        for key in ("state1", "state2")
        if isinstance(holder.get(key), Tensor)
    )
    return {id(entry): entry for entry in entries}


def _merged(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    # Values the checkpoint does not know keep what the constructor set.
    merged = {**group, **saved, "params": group["params"]}
    if isinstance(group.get("lr"), Tensor):
        # A learning rate on a device stays there.
        merged["lr"] = torch.as_tensor(saved.get("lr", group["lr"])).to(group["lr"])
    return merged


class StateReader:
    """Reads the states of single parameters: ``read(key, parameter, saved state, config)``.

    Args:
        state_rows: Rows of each state tensor.
        quant_keys: Entries that keep their dtype.
        move_to_device: Move each state to the device of its parameter.
        own_buffer: Copies a state tensor of a (local) parameter into memory of the optimizer's
            choice; None: where it is, or on the parameter's device.
    """

    def __init__(
        self,
        state_rows: tuple[int, ...],
        quant_keys: Collection[str],
        move_to_device: bool,
        own_buffer: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self._rows = state_rows
        self._quant_keys = quant_keys
        self._move = move_to_device
        self.own_buffer = own_buffer if move_to_device else None
        self._maps: list[Tensor] = []

    @torch.no_grad()
    def __call__(
        self,
        key: Any,
        p: Tensor,
        saved: dict[str, Any],
        config: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """Returns the state of parameter `p`, which the checkpoint calls `key`."""
        state = dict(saved)
        state.update(state.pop(WRAPPER, {}))
        where = f"load_state_dict: the state of parameter {key}"
        if "state1" in state:  # otherwise of another kind of optimizer; step() looks again
            check = self._check_and_convert
            state = sharding.detached(where, p, state, self._rows, check, config)
            part = sharding.local(p)
            check(where, part, state)
            if self.own_buffer is not None:
                for i in range(1, len(self._rows) + 1):
                    state[f"state{i}"] = self.own_buffer(part, state[f"state{i}"])
        placed = {name: self._placed(name, entry, p) for name, entry in state.items()}
        return sharding.attached(p, placed, self._rows)

    def _placed(self, name: str, entry: Any, p: Tensor) -> Any:
        if not isinstance(entry, Tensor):
            return entry
        device = p.device if self._move else entry.device
        if name in self._quant_keys:
            entry = entry.to(device)
            return self._shared(entry) if name in ("qmap1", "qmap2") else entry
        cast = entry.is_floating_point() and p.is_floating_point()
        return entry.to(device=device, dtype=p.dtype if cast else entry.dtype)

    def _shared(self, qmap: Tensor) -> Tensor:
        # Equal tables become one object, so that the parameters stay in one native call.
        built_in = (default_code(name, qmap.device) for name in ("dynamic", "udynamic"))
        for known in (*built_in, *self._maps):
            if known.device == qmap.device and torch.equal(known, qmap):
                return known
        self._maps.append(qmap)
        return qmap

    def _check_and_convert(self, where: str, p: Tensor, state: dict[str, Any]) -> None:
        step = state.get("step")
        if isinstance(step, Tensor) and step.numel() == 1:  # as torch's own optimizers keep it
            state["step"] = step = int(step.item())
        if not isinstance(step, int) or not 0 <= step < MOST_STEPS:
            raise ValueError(f"{where}: step must be an int from 0 to 2^62, got {step!r}")
        two = len(self._rows) == 2
        if ("state2" in state) != two:
            raise ValueError(f"{where}: state2 must {'' if two else 'not '}be there")
        for i, rows in enumerate(self._rows, 1):
            entry = state[f"state{i}"]
            if not isinstance(entry, Tensor) or entry.dtype not in (torch.uint8, torch.float32):
                got = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
                raise ValueError(f"{where}: state{i} must be uint8 or float32, got {got}")
            shape = tuple(p.shape) if rows == 1 else (rows, *p.shape)
            if tuple(entry.shape) != shape:
                meant = "the parameter's shape" if rows == 1 else "shape"
                raise ValueError(
                    f"{where}: state{i} must have {meant} {shape}, got {tuple(entry.shape)}"
                )
            if entry.dtype != state["state1"].dtype:
                raise ValueError(
                    f"{where}: state2 must be {state['state1'].dtype} like state1, "
                    f"got {entry.dtype}"
                )
            if entry.dtype == torch.uint8:
                _check_numbers(where, f"qmap{i}", state.get(f"qmap{i}"), LEVELS)
                if "absmax1" not in state and "max1" in state and rows == 1:
                    # Zero until the next step writes it.
                    zero = torch.zeros(1, device=entry.device)
                    state.setdefault(f"new_max{i}", zero)
                    _check_numbers(where, f"max{i}", state.get(f"max{i}"), 1)
                    _check_numbers(where, f"new_max{i}", state[f"new_max{i}"], 1)
                else:
                    _check_blocks(where, i, rows, state)
        for name, numel in (("unorm_vec", 1), ("gnorm_vec", NORM_HISTORY)):
            if name in state:
                _check_numbers(where, name, state[name], numel)


def _check_numbers(where: str, name: str, entry: Any, numel: int) -> None:
    if not isinstance(entry, Tensor) or entry.dtype != torch.float32 or entry.numel() != numel:
        got = f"{entry.dtype} {list(entry.shape)}" if isinstance(entry, Tensor) else repr(entry)
        raise ValueError(f"{where}: {name} must be a float32 tensor of {numel} elements, got {got}")


def _check_blocks(where: str, i: int, rows: int, state: dict[str, Any]) -> None:
    codes, absmax, qmap = state[f"state{i}"], state.get(f"absmax{i}"), state[f"qmap{i}"]
    if not isinstance(absmax, Tensor) or absmax.dtype != torch.float32:
        got = absmax.dtype if isinstance(absmax, Tensor) else type(absmax).__name__
        raise ValueError(f"{where}: absmax{i} must be a float32 tensor, got {got}")
    n = codes.numel() // rows
    blocks = rows * -(-n // BLOCK)
    if absmax.numel() == blocks:
        if rows == 2:
            state[f"absmax{i}"] = _rows_of_scales(codes.reshape(2, n), absmax, qmap)
        return
    if rows > 1 or absmax.numel() != -(-n // LEGACY_BLOCK):
        raise ValueError(
            f"{where}: absmax{i} must have {blocks} elements (one per {BLOCK}), "
            f"got {absmax.numel()}"
        )
    numbers = dequantize_blocks(codes.reshape(-1), absmax, qmap, LEGACY_BLOCK)
    new, state[f"absmax{i}"] = torch.ops.bitsandbytes.quantize_blockwise(numbers, qmap, BLOCK)
    state[f"state{i}"] = new.view(codes.shape)


def _rows_of_scales(codes: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    """Returns the scales of two states, float32 [2, blocks], whichever device wrote them.

    Public CUDA kernels put the scales of the second state ``n // 256`` places after those of the
    first. If n is no multiple of 256, that is one place too early: the last one stays zero, though
    codes that are not zero want it; and the last block of the first state shares its scale with
    the first block of the second.
    """
    n = codes.shape[1]
    scales = absmax.reshape(2, -1)
    tail = n % BLOCK
    if tail == 0 or scales[1, -1] != 0 or scales[0, -1] == 0:
        return scales
    if not qmap[codes[1, -tail:].long()].any():
        return scales
    flat = absmax.reshape(-1)
    return torch.stack([scales[0], flat[n // BLOCK : -1]])
