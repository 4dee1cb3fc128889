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

A state of two rows (AdEMAMix) is written row by row: ``{"row0": ..., "row1": ...}`` of DTensors,
entries ``state1`` and ``state1_row1`` of flattened parameters.

Numbers are quantized when they are read. In the blocks that they come from, they give back the same
codes and scales.
"""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plain.quantize import LEVELS, quantize_blocks
from ..plain.states import BLOCK
from ..quant.codes import default_code

__all__ = [
    "attached",
    "detached",
    "gradient_norms",
    "is_distributed",
    "is_dtensor",
    "is_flattened",
    "local",
    "local_lists",
    "part_bytes",
    "portable",
    "refuse_bounds",
    "split_of",
    "sum_of_parts",
]

_MAPS = ("dynamic", "udynamic")  # of state1, state2
_CHUNK = 2**22  # elements that are quantized at a time; a multiple of BLOCK


# ---- Kinds of parameter -------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor."""
    # Nobody can hold a DTensor before this module is loaded, which takes its time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flattened(p: Tensor) -> bool:
    """Whether FullyShardedDataParallel made `p` of parts of parameters, or a part of one."""
    return getattr(p, "_fsdp_flattened", False)  # the mark of FullyShardedDataParallel


def is_distributed(params: Iterable[Tensor]) -> bool:
    """Whether states of any of these parameters are written in the form described above."""
    return any(is_dtensor(p) or is_flattened(p) for p in params)


class Split(NamedTuple):
    """How a DTensor is split: every process has the same parameters in one such class."""

    mesh: Any
    dims: tuple[int, ...]  # of the mesh, which split it

    def parts(self) -> int:
        """The number of parts."""
        return math.prod(self.mesh.size(i) for i in self.dims)

    def part(self) -> tuple[int, ...]:
        """Returns what tells the local part from the others; replicas of it have the same."""
        coordinate = self.mesh.get_coordinate()
        return tuple(coordinate[i] for i in self.dims)


def split_of(tensor: Tensor) -> Split | None:
    """Returns how a DTensor is split; None for whole tensors and parts that know of no whole."""
    if not is_dtensor(tensor):
        return None
    mesh = tensor.device_mesh
    dims = [i for i, place in enumerate(tensor.placements) if _dim(place) is not None]
    dims = [i for i in dims if mesh.size(i) > 1]
    return Split(mesh, tuple(dims)) if dims and mesh.get_coordinate() is not None else None


def part_bytes(tensor: Tensor) -> int:
    """Returns the bytes of the local part of `tensor`, on average over the processes."""
    split = split_of(tensor)
    return tensor.nbytes if split is None else tensor.nbytes // split.parts()


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
    pairs = zip(params, grads, strict=True)
    return [local(p) for p in params], [_local_gradient(p, grad) for p, grad in pairs]


def _local_gradient(p: Tensor, grad: Tensor) -> Tensor:
    if not is_dtensor(p):
        return grad
    if grad.placements != p.placements:
        # For instance a sum that is still to be made over processes that hold replicas of p.
        grad = grad.redistribute(p.device_mesh, p.placements)
    found = grad.to_local()
    return found.wait() if hasattr(found, "wait") else found  # it may still be on its way


def refuse_bounds(config: dict[str, Any]) -> None:
    """Raises ValueError if settings of flattened parameters bound what only the whole has.

    Args:
        config: The settings, as ``Optimizer8bit.get_config`` returns them.
    """
    for name, none, what in (
        ("max_unorm", 0, "bounds norms of whole updates"),
        ("percentile_clipping", 100, "takes norms of whole gradients"),
    ):
        if config.get(name, none) != none:
            raise ValueError(
                f"step: {name} must be {none} for parameters flattened by "
                f"FullyShardedDataParallel, since it {what} (fully_shard knows them), "
                f"got {config[name]}"
            )


def sum_of_parts(split: Split, squares: Tensor) -> Tensor:
    """Adds up sums over the parts of DTensors, in one exchange.

    Args:
        split: How all of them are split.
        squares: Sums over the local parts, of any shape.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    places = [Partial() if i in split.dims else Replicate() for i in range(split.mesh.ndim)]
    whole = DTensor.from_local(squares, split.mesh, places, run_check=False).full_tensor()
    return whole.to(squares.device)  # of parts on the host, DTensor adds on the mesh's devices


def gradient_norms(split: Split, grads: list[Tensor]) -> list[Tensor]:
    """Returns the norm of each whole gradient, float32 [1].

    Args:
        split: How all of the parameters are split.
        grads: Local parts of the gradients.
    """
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])
    return list(sum_of_parts(split, norms.square()).sqrt().split(1))


# ---- States in memory ---------------------------------------------------------------------------


def attached(p: Tensor, state: dict[str, Any], state_rows: tuple[int, ...]) -> dict[str, Any]:
    """Returns the state of the local part of `p` with `state1`, `state2` as tensors like `p`."""
    if not is_dtensor(p):
        return state
    wrapped = dict(state)
    for i, rows in enumerate(state_rows, 1):
        if isinstance(state.get(f"state{i}"), Tensor):
            shape = tuple(p.shape) if rows == 1 else (rows, *p.shape)
            wrapped[f"state{i}"] = _wrapped(p, state[f"state{i}"], shape, shift=int(rows > 1))
    return wrapped


def _wrapped(p: Tensor, part: Tensor, shape: tuple[int, ...], shift: int = 0) -> Tensor:
    """Returns a DTensor of `shape` placed like `p`, but `shift` dimensions further right."""
    from torch.distributed.tensor import DTensor

    if part.storage_offset():
        # The same memory as a storage of its own: torch cannot copy.deepcopy a DTensor otherwise.
        part = torch.from_dlpack(part)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    places = [_moved(place, shift) for place in p.placements]
    size = {"shape": torch.Size(shape), "stride": strides}
    return DTensor.from_local(part, p.device_mesh, places, run_check=False, **size)


def _moved(placement: Any, shift: int) -> Any:
    dim = _dim(placement)
    if dim is None or shift == 0:
        return placement
    factor = getattr(placement, "split_factor", None)  # of tensor parallelism inside FSDP2
    more = {} if factor is None else {"split_factor": factor}
    return type(placement)(dim + shift, **more)


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
    if is_flattened(p):
        return _flattened_form(p, state, state_rows)
    if is_dtensor(p):
        plain = {**state, **{f"state{i}": local(state[f"state{i}"]) for i in _count(state_rows)}}
        shapes = _block_shapes(p.shape)

        def wrap(tensor: Tensor, by_blocks: bool) -> Tensor:
            return _wrapped(p, tensor, shapes[3 - tensor.dim()] if by_blocks else tuple(p.shape))

        _write(p, written, plain, state_rows, local(p).shape, wrap)
    return written


def _count(state_rows: tuple[int, ...]) -> range:
    return range(1, len(state_rows) + 1)


def _write(
    p: Tensor,
    written: dict[str, Any],
    state: dict[str, Any],
    state_rows: tuple[int, ...],
    shape: tuple[int, ...],
    place: Callable[[Tensor, bool], Tensor],
) -> None:
    """Puts what is written of plain tensors of `shape` into `written`.

    Args:
        p: The parameter.
        written: Gets codes and scales by rows of blocks, or the numbers they mean.
        state: State of `p`, or of a part of it.
        state_rows: Rows of each state tensor.
        shape: Shape of the tensors in `state`.
        place: Makes a DTensor of a tensor; the second argument says whether it is in blocks.
    """
    for i, rows in enumerate(state_rows, 1):
        by_blocks = f"absmax{i}" in state and _rows_are_blocks(p)
        forms = []
        for codes, scales in _rows(i, rows, state):
            if by_blocks:
                tensors = zip((codes, scales), _block_shapes(shape), strict=True)
                forms.append([tensor.view(each) for tensor, each in tensors])
            elif codes.dtype == torch.uint8:
                forms.append([_numbers(codes, scales, state[f"qmap{i}"]).view(shape)])
            else:
                forms.append([codes])
        written.pop(f"absmax{i}", None)
        for key, *tensors in zip((f"state{i}", f"absmax{i}"), *forms, strict=False):
            placed = [place(tensor, by_blocks) for tensor in tensors]
            written[key] = placed[0] if rows == 1 else _named(placed)


def _rows(i: int, rows: int, state: dict[str, Any]) -> list[tuple[Tensor, Tensor | None]]:
    """Returns `state{i}` and its scales, row by row."""
    codes, scales = state[f"state{i}"], state.get(f"absmax{i}", state.get(f"max{i}"))
    if rows == 1:
        return [(codes, scales)]
    return list(zip(codes, [None] * rows if scales is None else scales.view(rows, -1), strict=True))


def _named(tensors: list[Tensor]) -> dict[str, Tensor]:
    # One tensor for each row: the parameter's placements fit them as they are.
    return {f"row{r}": tensor for r, tensor in enumerate(tensors)}


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


def _block_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of codes and scales by rows of blocks."""
    blocks = math.prod(shape[1:]) // BLOCK
    return [(*shape[:1], blocks, BLOCK), (*shape[:1], blocks)]


def _numbers(codes: Tensor, scales: Tensor, qmap: Tensor) -> Tensor:
    """Returns the numbers that flat codes mean, float32 [n]: blocks, or one scale for all."""
    flat, table = codes.reshape(-1), _closed(qmap)
    if scales.numel() != -(-flat.numel() // BLOCK):
        return table[flat.int()] * scales
    return torch.ops.bitsandbytes.dequantize_blockwise(
        flat, scales.reshape(-1), table, BLOCK, torch.float32
    )


def _closed(qmap: Tensor) -> Tensor:
    """Returns the levels with the outer ones moved to where the largest numbers of blocks were.

    The signed map ends at -0.993: numbers decoded with it lose the scale of a block whose largest
    number is negative. Decoded with these levels, numbers give back their codes and scales.
    """
    table = qmap.clone()
    table[-1] = 1.0
    table[0] = torch.where(qmap[0] < 0, -1.0, qmap[0])
    return table


def _flattened_form(
    p: Tensor, state: dict[str, Any], state_rows: tuple[int, ...]
) -> dict[str, Any]:
    """Tensors of the parameter's shape and of one dtype: FSDP1 takes apart nothing else."""
    written = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    for i, rows in enumerate(state_rows, 1):
        for key, (codes, scales) in zip(_row_keys(i, rows), _rows(i, rows, state), strict=True):
            written[key] = codes
            if codes.dtype == torch.uint8:
                # Four times the size of the codes: not where memory is short.
                written[key] = _numbers(codes, scales, state[f"qmap{i}"]).view(p.shape).cpu()
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
    columns = {key: _column(key, rows, state) for key, rows in _keys(state_rows)}
    if not all(columns[f"state{i}"] for i in _count(state_rows)):
        return dict(saved)  # `check` says what is wrong
    tensors = [tensor for column in columns.values() for tensor in column]
    if is_dtensor(p) and not any(map(is_dtensor, tensors)):
        _join(columns, state, state_rows, p.shape)
        check(where, p, state)
        _write(p, state, dict(state), state_rows, p.shape, lambda tensor, _: _cut(p, tensor))
        columns = {key: _column(key, rows, state) for key, rows in _keys(state_rows)}
    _take_parts(where, p, columns)
    _join(columns, state, state_rows, local(p).shape)
    if all(state[f"state{i}"].dtype == torch.float32 for i in _count(state_rows)):
        for i, rows in enumerate(state_rows, 1):
            _read_numbers(where, i, rows, p, state, config)
    return state


def _keys(state_rows: tuple[int, ...]) -> list[tuple[str, int]]:
    pairs = enumerate(state_rows, 1)
    return [(f"{kind}{i}", rows) for i, rows in pairs for kind in ("state", "absmax")]


def _column(key: str, rows: int, state: dict[str, Any]) -> list[Tensor]:
    """Returns the rows of a saved entry; a tensor that holds all of them counts as one."""
    entry = state.get(key)
    if isinstance(entry, dict):
        found = list(entry.values())
    else:
        found = [entry, *(state.pop(f"{key}_row{r}", None) for r in range(1, rows))]
        found = found if found[-1] is not None else found[:1]
    return found if all(isinstance(each, Tensor) for each in found) else []


def _cut(p: Tensor, whole: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    # Every process cuts its part out of the tensor that it has.
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def _take_parts(where: str, p: Tensor, columns: dict[str, list[Tensor]]) -> None:
    """Replaces DTensors by their local parts."""
    for key, column in columns.items():
        for r, saved in enumerate(column):
            if not is_dtensor(saved):
                continue
            if not is_dtensor(p):
                raise ValueError(
                    f"{where}: {key} must be a plain tensor like its parameter, got a DTensor; "
                    "states gathered with full_state_dict=True fit"
                )
            shape = tuple(p.shape)
            if columns[f"state{key[-1]}"][0].dtype == torch.uint8:
                shape = _block_shapes(p.shape)[key.startswith("absmax")]
            elif key.startswith("absmax"):
                continue  # of codes that numbers have replaced
            if tuple(saved.shape) != shape or saved.placements != p.placements:
                raise ValueError(
                    f"{where}: {key} must be a DTensor of shape {shape} placed like its parameter "
                    f"{p.placements}, got {tuple(saved.shape)} {saved.placements}"
                )
            column[r] = local(saved)


def _join(
    columns: dict[str, list[Tensor]],
    state: dict[str, Any],
    state_rows: tuple[int, ...],
    shape: tuple[int, ...],
) -> None:
    """Puts rows into `state` as they are in memory, for a tensor of `shape`."""
    by_blocks = _block_shapes(shape)
    for i, rows in enumerate(state_rows, 1):
        codes, scales = columns[f"state{i}"], columns[f"absmax{i}"]
        if codes[0].dtype != torch.uint8:
            state.pop(f"absmax{i}", None)
            scales = []
        if scales and [codes[0].shape, scales[0].shape] == by_blocks:
            codes = [each.reshape(shape) for each in codes]
            scales = [each.reshape(-1) for each in scales]
        for key, column in ((f"state{i}", codes), (f"absmax{i}", scales)):
            if column:
                state[key] = torch.stack(column) if len(column) == rows > 1 else column[0]


def _read_numbers(
    where: str,
    i: int,
    rows: int,
    p: Tensor,
    state: dict[str, Any],
    config: Callable[[], dict[str, Any]],
) -> None:
    """Quantizes a float32 state that was or will be an 8-bit one."""
    numbers = state[f"state{i}"]
    # Only numbers of an 8-bit state have a table beside them; FSDP1 cannot carry it.
    qmap, by_blocks = state.get(f"qmap{i}"), f"max{i}" not in state
    if qmap is None and is_flattened(p):
        settings = config()
        if settings["optim_bits"] == 8 and p.numel() >= settings["min_8bit_size"]:
            qmap, by_blocks = default_code(_MAPS[i - 1], numbers.device), settings["block_wise"]
    if qmap is None:
        return
    if not isinstance(qmap, Tensor) or qmap.numel() != LEVELS:
        got = list(qmap.shape) if isinstance(qmap, Tensor) else repr(qmap)
        raise ValueError(f"{where}: qmap{i} must be a table of {LEVELS} levels, got {got}")
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
