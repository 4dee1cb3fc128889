# SPDX-License-Identifier: MIT
"""Parameters that PyTorch distributes: local parts for the kernels, states that follow them.

Parameters lie on several processes as

- DTensors (``fully_shard``, tensor parallelism): tensors of the whole shape that know their parts,
- flattened parameters (``FullyShardedDataParallel``): parts that know nothing of the whole,
- replicas (DDP, DTensors without a sharded dimension): whole tensors, like any other parameter.

A step works on local parts. There is no communication of our own: where something has to be
exchanged, operations of DTensor do it.

In memory, `state1` and `state2` of a DTensor are DTensors placed like it; scales and tables are
plain tensors that belong to the local part.

In state dictionaries of such optimizers, tensors stand beside ``step`` and their layout follows
from the parameter, not from the number of processes. 8-bit states are written

- of DTensors whose rows (along the first dimension) are whole blocks, wherever they are cut: codes
  ``[rows, blocks, 256]`` and scales ``[rows, blocks]``, placed like the parameter. The shape keeps
  codes from being read into 32-bit states;
- of other DTensors: as numbers, float32 of the parameter's shape, beside their table;
- of flattened parameters: as numbers, float32 of the part's shape.

Numbers are quantized when they are read. In the blocks that they come from, they give back the same
codes and scales.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..plain.optimizer import BLOCK
from ..plain.quantize import quantize_blocks
from ..quant.codes import default_code

__all__ = [
    "attached",
    "detached",
    "gradient_norms",
    "is_distributed",
    "is_dtensor",
    "local",
    "local_lists",
    "part_of",
    "portable",
    "refuse_bounds",
]

_MAPS = ("dynamic", "udynamic")  # of state1, state2
_CHUNK = 2**22  # elements that are quantized at a time; a multiple of BLOCK
_FLAT = "flattened by FSDP1"


# ---- Kinds of parameter -------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor."""
    # Nobody can hold a DTensor before this module is loaded, which takes its time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_flattened(p: Tensor) -> bool:
    return getattr(p, "_fsdp_flattened", False)  # the mark of FullyShardedDataParallel


def is_distributed(params: Iterable[Tensor]) -> bool:
    """Whether states of any of these parameters are written in the form described above."""
    return any(is_dtensor(p) or _is_flattened(p) for p in params)


def part_of(p: Tensor) -> tuple | None:
    """Returns what tells the local part of `p` from its other parts; None if it is the whole.

    Replicas of one part have equal values, different parts of one DTensor have different ones.
    """
    if _is_flattened(p):
        return (_FLAT,)
    if not is_dtensor(p):
        return None
    mesh = p.device_mesh
    split = [i for i, place in enumerate(p.placements) if _dim(place) is not None]
    split = [i for i in split if mesh.size(i) > 1]
    coordinate = mesh.get_coordinate()
    if not split or coordinate is None:
        return None
    return tuple(coordinate[i] for i in split)


def _dim(placement: Any) -> int | None:
    """The tensor dimension that a placement shards, None for the others."""
    return getattr(placement, "dim", None)


# ---- Steps --------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a DTensor that lies on this process, and any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_lists(params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the local parts of parameters and gradients, to be asked for in every step.

    FSDP may put either elsewhere between two steps.
    """
    parts = [local(p) for p in params]
    return parts, [_local_gradient(*each) for each in zip(params, parts, grads, strict=True)]


def _local_gradient(p: Tensor, part: Tensor, grad: Tensor) -> Tensor:
    if not is_dtensor(p):
        return grad
    if grad.placements != p.placements:
        # For instance a sum that is still to be made over processes that hold replicas of p.
        grad = grad.redistribute(p.device_mesh, p.placements)
    found = grad.to_local()
    if hasattr(found, "wait"):  # still on its way
        found = found.wait()
    if found.stride() != part.stride():
        found = torch.empty_like(part, dtype=found.dtype).copy_(found)
    return found


def refuse_bounds(part: tuple | None, config: dict[str, Any]) -> None:
    """Raises ValueError if settings bound whole tensors of which only a part is known here.

    Args:
        part: As `part_of` returns it.
        config: Settings of the parameters, as ``Optimizer8bit.get_config`` returns them.
    """
    if part is None:
        return
    if config["max_unorm"] > 0.0:
        raise ValueError(
            "step: max_unorm must be 0 for parameters split among processes, since it bounds the "
            f"norm of a whole update, got {config['max_unorm']}"
        )
    if config["percentile_clipping"] < 100 and part == (_FLAT,):
        raise ValueError(
            "step: percentile_clipping must be 100 for parameters flattened by "
            "FullyShardedDataParallel, since it takes norms of whole gradients (fully_shard knows "
            f"them), got {config['percentile_clipping']}"
        )


def gradient_norms(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Returns the norm of each whole gradient, float32 [1].

    Args:
        params: The DTensors.
        grads: Local parts of their gradients.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    members: dict[tuple, list[int]] = {}
    for i, p in enumerate(params):
        sums = tuple(Replicate() if _dim(place) is None else Partial() for place in p.placements)
        members.setdefault((p.device_mesh, sums), []).append(i)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
    for (mesh, sums), indices in members.items():
        # One exchange for all parameters that lie alike.
        squares = torch.stack([norms[i] for i in indices]).square()
        whole = DTensor.from_local(squares, mesh, sums, run_check=False).full_tensor().sqrt()
        for i, norm in zip(indices, whole.split(1), strict=True):
            norms[i] = norm
    return norms


# ---- States in memory ---------------------------------------------------------------------------


def attached(p: Tensor, state: dict[str, Any], state_rows: tuple[int, ...]) -> dict[str, Any]:
    """Returns the state of the local part of `p` with `state1`, `state2` as tensors like `p`."""
    if not is_dtensor(p):
        return state
    wrapped = dict(state)
    for i, rows in enumerate(state_rows, 1):
        if isinstance(state.get(f"state{i}"), Tensor):
            lead = _lead(rows)
            wrapped[f"state{i}"] = _wrapped(p, state[f"state{i}"], (*lead, *p.shape), len(lead))
    return wrapped


def _lead(rows: int) -> tuple[int, ...]:
    return () if rows == 1 else (rows,)


def _placements(p: Tensor, shift: int) -> list:
    """The placements of `p`, for a tensor with `shift` more dimensions in front."""
    return [_moved(place, shift) for place in p.placements]


def _moved(placement: Any, shift: int) -> Any:
    dim = _dim(placement)
    if dim is None or shift == 0:
        return placement
    factor = getattr(placement, "split_factor", None)  # of tensor parallelism inside FSDP2
    more = {} if factor is None else {"split_factor": factor}
    return type(placement)(dim + shift, **more)


def _wrapped(p: Tensor, part: Tensor, shape: tuple[int, ...], shift: int) -> Tensor:
    from torch.distributed.tensor import DTensor

    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(
        part,
        p.device_mesh,
        _placements(p, shift),
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )


def _sharded(p: Tensor, whole: Tensor, shift: int) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # Every process cuts its part out of the tensor that it has.
    return distribute_tensor(whole, p.device_mesh, _placements(p, shift), src_data_rank=None)


# ---- States in state dictionaries: writing -------------------------------------------------------


def portable(p: Tensor, state: dict[str, Any], state_rows: tuple[int, ...]) -> dict[str, Any]:
    """Returns the state of `p` as it is written when parameters of the optimizer are distributed.

    Args:
        p: The parameter.
        state: Its state; not changed. What is returned shares memory where it can.
        state_rows: Rows of each state tensor.
    """
    written = dict(state)
    if "state1" not in state:
        return written
    for i in (1, 2):
        if f"qmap{i}" in state:
            # Checkpoints are loaded into what is returned, and this table is everybody's.
            written[f"qmap{i}"] = state[f"qmap{i}"].clone()
    if _is_flattened(p):
        return _flattened_form(written, state_rows)
    if not is_dtensor(p):
        return written
    by_blocks = "absmax1" in state and _rows_are_blocks(p)
    for i, rows in enumerate(state_rows, 1):
        part = local(state[f"state{i}"])
        if part.dtype == torch.uint8:
            lead = _lead(rows)
            written[f"state{i}"] = part
            _encode(i, rows, written, part.shape[len(lead) :], by_blocks)
            for key, shape in _written_shapes(i, p.shape, by_blocks).items():
                written[key] = _wrapped(p, written[key], (*lead, *shape), len(lead))
    return written


def _rows_are_blocks(p: Tensor) -> bool:
    """Whether the blocks of every part of `p`, on any process, are blocks of whole rows of `p`."""
    row = math.prod(p.shape[1:])
    if p.dim() < 2 or row % BLOCK:
        return False
    cuts = 1  # of the second dimension
    for i, placement in enumerate(p.placements):
        dim = _dim(placement)
        if dim is not None and dim > 1:
            return False
        if dim == 1:
            cuts *= p.device_mesh.size(i)
    return p.shape[1] % cuts == 0 and row // cuts % BLOCK == 0


def _written_shapes(i: int, shape: tuple[int, ...], by_blocks: bool) -> dict[str, tuple[int, ...]]:
    """Shapes, without rows, of the entries that `_encode` makes for a tensor of `shape`."""
    if not by_blocks:
        return {f"state{i}": tuple(shape)}
    blocks = math.prod(shape[1:]) // BLOCK
    return {f"state{i}": (shape[0], blocks, BLOCK), f"absmax{i}": (shape[0], blocks)}


def _encode(
    i: int, rows: int, state: dict[str, Any], shape: tuple[int, ...], by_blocks: bool
) -> None:
    """Replaces the codes `state{i}` of a tensor of `shape` by what is written for them."""
    lead = _lead(rows)
    if not by_blocks:
        state[f"state{i}"] = _numbers(i, rows, state).view(*lead, *shape)
        state.pop(f"absmax{i}", None)
        return
    for key, written in _written_shapes(i, shape, by_blocks).items():
        state[key] = state[key].view(*lead, *written)


def _numbers(i: int, rows: int, state: dict[str, Any]) -> Tensor:
    """Returns the numbers that codes mean, float32 [rows, n]."""
    codes, table = state[f"state{i}"].reshape(rows, -1), _closed(state[f"qmap{i}"])
    if f"absmax{i}" not in state:
        return table[codes.int()] * state[f"max{i}"]
    numbers = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    absmax = state[f"absmax{i}"].reshape(rows, -1)
    for r in range(rows):
        torch.ops.bitsandbytes.dequantize_blockwise.out(
            codes[r], absmax[r], table, BLOCK, torch.float32, out=numbers[r]
        )
    return numbers


def _closed(qmap: Tensor) -> Tensor:
    """Returns the levels with the outer ones moved to where the largest numbers of blocks were.

    The signed map ends at -0.993: numbers decoded with it lose the scale of a block whose largest
    number is negative. Decoded with these levels, numbers give back their codes and scales.
    """
    table = qmap.clone()
    table[-1] = 1.0
    table[0] = torch.where(qmap[0] < 0, -1.0, qmap[0])
    return table


def _flattened_form(state: dict[str, Any], state_rows: tuple[int, ...]) -> dict[str, Any]:
    """Tensors of the parameter's shape and of one dtype: FSDP1 takes apart nothing else."""
    written = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    for i, rows in enumerate(state_rows, 1):
        tensor = state[f"state{i}"]
        if tensor.dtype == torch.uint8:
            # Four times the size of the codes: not where memory is short.
            tensor = _numbers(i, rows, state).cpu().view(tensor.shape)
        written.update(zip(_row_keys(i, rows), tensor if rows > 1 else [tensor], strict=True))
    return written


def _row_keys(i: int, rows: int) -> list[str]:
    return [f"state{i}" if r == 0 else f"state{i}_row{r}" for r in range(rows)]


# ---- States in state dictionaries: reading -------------------------------------------------------


def detached(
    where: str,
    p: Tensor,
    saved: dict[str, Any],
    state_rows: tuple[int, ...],
    check: Callable[[str, Tensor, dict[str, Any]], None],
    config: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Returns a saved state as plain tensors for the local part of `p`.

    Args:
        where: How errors begin.
        p: The parameter.
        saved: Its state, as `portable` wrote it for any number of processes, or as one process
            writes that of a plain parameter.
        state_rows: Rows of each state tensor.
        check: ``check(where, p, state)`` refuses or converts the state of a plain parameter.
        config: Returns the settings of `p`, for states that do not say what they were.

    Raises:
        ValueError: A tensor has another shape than the parameter asks for.
    """
    # Flattening to one dictionary and back leaves an empty one for each entry that was not written.
    state = {k: v for k, v in saved.items() if not (isinstance(v, dict) and not v)}
    if not isinstance(state.get("state1"), Tensor):
        return state
    for i, rows in enumerate(state_rows, 1):
        keys = _row_keys(i, rows)
        if keys[-1] in state and rows > 1:
            state[keys[0]] = torch.stack([state.pop(key) for key in keys])
    if is_dtensor(p) and not any(map(is_dtensor, state.values())):
        for i, rows in enumerate(state_rows, 1):
            _read_blocks(i, rows, state, p.shape)
        check(where, p, state)
        _cut(p, state, state_rows)
    _take_parts(where, p, state, state_rows)
    part = local(p)
    for i, rows in enumerate(state_rows, 1):
        _read_blocks(i, rows, state, part.shape)
        _read_numbers(i, rows, p, state, config)
    return state


def _cut(p: Tensor, state: dict[str, Any], state_rows: tuple[int, ...]) -> None:
    """Replaces the tensors of the whole parameter by DTensors."""
    by_blocks = "absmax1" in state and _rows_are_blocks(p)
    for i, rows in enumerate(state_rows, 1):
        keys = [f"state{i}"]
        if state[keys[0]].dtype == torch.uint8:
            _encode(i, rows, state, p.shape, by_blocks)
            keys = list(_written_shapes(i, p.shape, by_blocks))
        for key in keys:
            state[key] = _sharded(p, state[key], len(_lead(rows)))


def _take_parts(where: str, p: Tensor, state: dict[str, Any], state_rows: tuple[int, ...]) -> None:
    """Replaces DTensors by their local parts."""
    by_blocks = state["state1"].dtype == torch.uint8
    for i, rows in enumerate(state_rows, 1):
        lead = _lead(rows)
        if not by_blocks:
            # Of a state that the numbers of another one replaced.
            state.pop(f"absmax{i}", None)
        for key in (f"state{i}", f"absmax{i}"):
            saved = state.get(key)
            if not is_dtensor(saved):
                continue
            if not is_dtensor(p):
                raise ValueError(
                    f"{where}: {key} must be a plain tensor like its parameter, got a DTensor; "
                    "states gathered with full_state_dict=True fit"
                )
            shape = (*lead, *_written_shapes(i, p.shape, by_blocks).get(key, ()))
            places = tuple(_placements(p, len(lead)))
            if tuple(saved.shape) != shape or saved.placements != places:
                raise ValueError(
                    f"{where}: {key} must be a DTensor of shape {shape} placed like its parameter "
                    f"{places}, got {tuple(saved.shape)} {saved.placements}"
                )
            state[key] = local(saved)


def _read_blocks(i: int, rows: int, state: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Gives codes and scales written by rows of blocks the shapes they have in memory."""
    codes, absmax, lead = state.get(f"state{i}"), state.get(f"absmax{i}"), _lead(rows)
    if not isinstance(codes, Tensor) or not isinstance(absmax, Tensor) or not shape:
        return
    written = _written_shapes(i, shape, by_blocks=True).values()
    if [codes.shape, absmax.shape] == [(*lead, *each) for each in written]:
        state[f"state{i}"] = codes.reshape(*lead, *shape)
        state[f"absmax{i}"] = absmax.reshape(*lead, math.prod(absmax.shape[len(lead) :]))


def _read_numbers(
    i: int, rows: int, p: Tensor, state: dict[str, Any], config: Callable[[], dict[str, Any]]
) -> None:
    """Quantizes a float32 state that was or will be an 8-bit one."""
    numbers = state.get(f"state{i}")
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.float32:
        return
    # Only numbers of an 8-bit state have a table beside them; FSDP1 cannot carry it.
    qmap, by_blocks = state.get(f"qmap{i}"), f"max{i}" not in state
    if qmap is None and _is_flattened(p):
        settings = config()
        if settings["optim_bits"] == 8 and p.numel() >= settings["min_8bit_size"]:
            qmap, by_blocks = default_code(_MAPS[i - 1], numbers.device), settings["block_wise"]
    if qmap is None:
        return
    state[f"qmap{i}"] = qmap
    codes, scales = [], []
    for row in numbers.reshape(rows, -1):
        quantized = _quantized(row, qmap.to(row.device), BLOCK if by_blocks else row.numel())
        codes.append(quantized[0])
        scales.append(quantized[1])
    state[f"state{i}"] = torch.stack(codes).view(numbers.shape)
    if by_blocks:
        state[f"absmax{i}"] = torch.stack(scales) if rows > 1 else scales[0]
    else:
        state[f"max{i}"] = scales[0] if numbers.numel() else numbers.new_zeros(1)
        state[f"new_max{i}"] = numbers.new_zeros(1)


def _quantized(numbers: Tensor, qmap: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantizes flat numbers, a part at a time: the search needs many bytes per element."""
    if blocksize != BLOCK or numbers.numel() == 0:
        return quantize_blocks(numbers, qmap, max(blocksize, 1), keep_sign=True)
    parts = [quantize_blocks(part, qmap, BLOCK, keep_sign=True) for part in numbers.split(_CHUNK)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([absmax for _, absmax in parts])
