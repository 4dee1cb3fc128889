# SPDX-License-Identifier: MIT
"""Layouts of int8 matrices that products once needed, and functions that take and give them.

Nothing here needs another layout than rows. Programs that ask for the layout by
:func:`get_special_format_str` get ``"row"``, and then move nothing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_output
from .int8 import int8_linear_matmul, int8_mm_dequant

__all__ = [
    "extract_outliers",
    "get_special_format_str",
    "get_transform_buffer",
    "igemmlt",
    "mm_dequant",
    "nvidia_transform",
    "transform",
]

State = tuple[Sequence[int], str]  # shape of the matrix, and its layout

# Rows of a matrix in these layouts come in tiles of so many, columns in tiles of 32.
TILE_ROWS = {"col32": 1, "col_turing": 8, "col_ampere": 32}
LAYOUTS = ("row", "col", *TILE_ROWS)
TILE_COLS = 32


def _check_layout(name: str, order: str) -> None:
    if order not in LAYOUTS:
        raise NotImplementedError(
            f"{name}: the layout must be one of {', '.join(LAYOUTS)}, got {order}"
        )


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _padded(n: int, tile: int) -> int:
    return -(-n // tile) * tile


def _buffer_shape(rows: int, cols: int, order: str) -> tuple[int, int]:
    if order in TILE_ROWS:
        return _padded(rows, TILE_ROWS[order]), _padded(cols, TILE_COLS)
    return rows, cols


def _places(rows: int, cols: int, order: str, device: torch.device) -> Tensor:
    """Returns where each element of a matrix lies in memory, ``[rows, cols]``."""
    r = torch.arange(rows, device=device).unsqueeze(1)
    c = torch.arange(cols, device=device)
    if order == "row":
        return r * cols + c
    if order == "col":
        return c * rows + r
    column = c % TILE_COLS
    tile = c // TILE_COLS * TILE_COLS * _padded(rows, TILE_ROWS[order])
    if order == "col32":
        return tile + r * TILE_COLS + column
    if order == "col_turing":
        odd = r % 2
        return tile + r // 8 * 256 + odd * 128 + column // 4 * 16 + column % 4 + 2 * (r % 8 - odd)
    in_tile = r % 32
    row = in_tile % 8 // 2 * 8 + in_tile // 8 * 2 + in_tile % 2
    return tile + r // 32 * 1024 + row * TILE_COLS + column


def _rows_of(name: str, A: Tensor, state: State) -> Tensor:
    """Returns a matrix as rows ``[rows, cols]``, whatever its layout."""
    shape, order = state
    _check_layout(name, order)
    rows, cols = _flat(shape)
    needed = math.prod(_buffer_shape(rows, cols, order))
    if A.numel() != needed:
        raise ValueError(
            f"{name}: a matrix {list(shape)} in the layout {order} must have {needed} elements, "
            f"got shape {list(A.shape)}"
        )
    if order == "row":
        return A.reshape(rows, cols)
    return A.reshape(-1)[_places(rows, cols, order, A.device)]


def _store(values: Tensor, out: Tensor, order: str) -> None:
    """Writes rows into a contiguous buffer of a layout; its padding becomes zero."""
    flat = out.zero_().view(-1)
    flat[_places(*values.shape, order, values.device).view(-1)] = values.reshape(-1)


def get_special_format_str() -> str:
    """Returns the layout that weights need: ``"row"``."""
    return "row"


def get_transform_buffer(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | int,
    to_order: str,
    from_order: str = "row",
    transpose: bool = False,
) -> tuple[Tensor, State]:
    """Returns zeros with room for a matrix in a layout, and the state that goes with it.

    Args:
        shape: Shape of the matrix; leading dimensions are rows.
        dtype: dtype of the buffer.
        device: Where it is made.
        to_order: ``"row"``, ``"col"``, ``"col32"``, ``"col_turing"`` or ``"col_ampere"``.
        from_order: Not used.
        transpose: Whether the buffer is for the transposed matrix.

    Returns:
        The buffer, and the pair of the shape that it holds and `to_order`.

    Raises:
        NotImplementedError: If the layout is not known.

    Example:
        >>> buffer, state = get_transform_buffer((5, 40), torch.int8, "cpu", "col_turing")
        >>> buffer.shape, state
        (torch.Size([8, 64]), ((5, 40), 'col_turing'))
    """
    _check_layout("get_transform_buffer", to_order)
    shape = tuple(shape)
    if transpose:
        shape = _flat(shape)[::-1]
    padded = _buffer_shape(*_flat(shape), to_order) if to_order in TILE_ROWS else shape
    return torch.zeros(padded, dtype=dtype, device=device), (shape, to_order)


def transform(
    A: Tensor,
    to_order: str,
    from_order: str = "row",
    out: Tensor | None = None,
    transpose: bool = False,
    state: State | None = None,
    ld: int | None = None,
) -> tuple[Tensor, State]:
    """Moves a matrix, or its transpose, into another layout.

    Args:
        A: Matrix of integers in a layout; leading dimensions are rows.
        to_order: Layout of the result.
        from_order: Layout of `A` where `state` is None.
        out: Contiguous buffer for the result, as :func:`get_transform_buffer` makes it.
        transpose: Whether the matrix is transposed on the way.
        state: Shape and layout of `A`.
        ld: Not used.

    Returns:
        The buffer, with zeros beside the matrix, and the pair of its shape and layout.

    Raises:
        NotImplementedError: If a layout is not known.
        ValueError: If `A` is too small or too large for its state.

    Example:
        >>> A = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> moved, state = transform(A, "col32")
        >>> transform(moved, "row", state=state)[0]
        tensor([[1, 2],
                [3, 4]], dtype=torch.int8)
    """
    _check_layout("transform", to_order)
    if state is None:
        state = (tuple(A.shape), from_order)
    values = _rows_of("transform", A, state)
    buffer, new_state = get_transform_buffer(
        state[0], A.dtype, A.device, to_order, state[1], transpose
    )
    _store(values.t() if transpose else values, buffer, to_order)
    check_output("transform", "out", out, buffer.numel())
    if out is None:
        return buffer, new_state
    return out.copy_(buffer.view(out.shape)), new_state


def nvidia_transform(
    A: Tensor,
    to_order: str,
    from_order: str = "row",
    out: Tensor | None = None,
    transpose: bool = False,
    state: State | None = None,
    ld: int | None = None,
) -> tuple[Tensor, State]:
    """Does what :func:`transform` does."""
    return transform(A, to_order, from_order, out, transpose, state, ld)


def igemmlt(
    A: Tensor,
    B: Tensor,
    SA: State,
    SB: State,
    out: Tensor | None = None,
    Sout: State | None = None,
    dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, State]:
    """Multiplies an int8 matrix with the transpose of another, each in any layout.

    Args:
        A: int8 matrix ``[..., K]`` in the layout of `SA`.
        B: int8 matrix ``[N, K]`` in the layout of `SB`.
        SA: Shape and layout of `A`.
        SB: Shape and layout of `B`.
        out: Contiguous buffer for the product.
        Sout: Shape and layout of `out`; by default those that the product has.
        dtype: ``torch.int32``, or ``torch.int8`` for sums bounded to -128 and 127.

    Returns:
        The product ``[..., N]`` in rows if `A` is, else in the layout ``"col32"``; and the pair of
        its shape and layout.

    Raises:
        ValueError: If dtypes or shapes do not fit.

    Example:
        >>> A = torch.tensor([[100, 2]], dtype=torch.int8)
        >>> igemmlt(A, A, ((1, 2), "row"), ((1, 2), "row"))
        (tensor([[10004]], dtype=torch.int32), ((1, 1), 'row'))
    """
    if dtype not in (torch.int32, torch.int8):
        raise ValueError(f"igemmlt: dtype must be torch.int32 or torch.int8, got {dtype}")
    left, right = _rows_of("igemmlt", A, SA), _rows_of("igemmlt", B, SB)
    product = int8_linear_matmul(left, right)
    if dtype == torch.int8:
        product = product.clamp_(-128, 127).to(torch.int8)
    shape = (*SA[0][:-1], right.shape[0])
    order = Sout[1] if Sout is not None else ("row" if SA[1] == "row" else "col32")
    buffer, state = get_transform_buffer(shape, dtype, A.device, order)
    _store(product, buffer, order)
    check_output("igemmlt", "out", out, buffer.numel())
    if out is None:
        return buffer, state
    return out.copy_(buffer.view(out.shape)), state


def mm_dequant(
    A: Tensor,
    quant_state: State | None,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    new_row_stats: Tensor | None = None,
    new_col_stats: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns the values of a product of :func:`igemmlt`.

    Args:
        A: int32 product in the layout of `quant_state`.
        quant_state: Shape and layout of `A`; None for rows.
        row_stats: float32 statistics of the left operand, one per row.
        col_stats: float32 statistics of the right operand, one per column.
        out: Floating-point tensor ``[rows, N]`` that takes the result.
        new_row_stats: Not used.
        new_col_stats: Not used.
        bias: Floating-point vector ``[N]``.

    Returns:
        float16 ``[rows, N]``, or the shape of `A` where that is in rows; `out` if given.

    Raises:
        ValueError: If a dtype or a shape does not fit.

    Example:
        >>> product, state = torch.tensor([[16129]], dtype=torch.int32), ((1, 1), "row")
        >>> mm_dequant(product, state, torch.tensor([2.0]), torch.tensor([3.0]))
        tensor([[6.]], dtype=torch.float16)
    """
    if quant_state is not None and quant_state[1] != "row":
        A = _rows_of("mm_dequant", A, quant_state)
    return int8_mm_dequant(A, row_stats, col_stats, out, bias)


def extract_outliers(A: Tensor, SA: State, idx: Tensor) -> Tensor:
    """Returns some columns of an int8 matrix in any layout.

    Args:
        A: int8 matrix in the layout of `SA`.
        SA: Shape and layout of `A`.
        idx: Columns, integers ``[n]``.

    Returns:
        int8 ``[rows, n]``.

    Raises:
        ValueError: If `A` is too small or too large for its state.

    Example:
        >>> A = torch.tensor([[1, 2, 3]], dtype=torch.int8)
        >>> extract_outliers(A, ((1, 3), "row"), torch.tensor([2, 0], dtype=torch.int32))
        tensor([[3, 1]], dtype=torch.int8)
    """
    return _rows_of("extract_outliers", A, SA)[:, idx.long()]
