# SPDX-License-Identifier: MIT
"""Products of int8 matrices in exact 32-bit integers, under their old names."""

import math
import warnings

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import check_output

__all__ = ["batched_igemm", "check_matmul", "igemm"]


def _warn(name: str) -> None:
    warnings.warn(
        f"{name} is kept for old programs: use int8_linear_matmul, which multiplies with the "
        "transposed second operand",
        FutureWarning,
        stacklevel=3,
    )


def _turned(A: Tensor, transposed: bool) -> Tensor:
    return A.transpose(-2, -1) if transposed else A


def _is_contraction(A: Tensor, B: Tensor, out: Tensor | None) -> bool:
    """Whether the sum runs over batch and rows of both operands: ``bsi,bso->io``."""
    return (
        A.dim() == B.dim() == 3
        and out is not None
        and A.shape[:2] == B.shape[:2]
        and tuple(out.shape) == (A.shape[2], B.shape[2])
    )


def _check(
    name: str,
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    for argument, tensor in (("A", A), ("B", B)):
        if tensor.dtype != expected_type:
            raise TypeError(f"{name}: {argument} must be {expected_type}, got {tensor.dtype}")
    if _is_contraction(A, B, out):
        return tuple(out.shape)
    a, b = _turned(A, transposed_A), _turned(B, transposed_B)
    fits = (a.dim(), b.dim()) in ((2, 2), (3, 2), (3, 3)) and a.shape[-1] == b.shape[-2]
    if not fits or (b.dim() == 3 and a.shape[0] != b.shape[0]):
        raise ValueError(
            f"{name}: B must be [K, N] or [batch, K, N] for A of shape {list(a.shape)}, "
            f"got {list(b.shape)}"
        )
    shape = (*a.shape[:-1], b.shape[-1])
    check_output(name, "out", out, shape)
    return shape


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """Checks the operands of :func:`igemm` and returns the shape of the product.

    Args:
        A: Matrix ``[M, K]`` or batch of them.
        B: Matrix ``[K, N]`` or batch of them.
        out: Tensor for the product, or None.
        transposed_A: Whether the last two dimensions of `A` change places first.
        transposed_B: The same for `B`.
        expected_type: dtype that both must have.

    Returns:
        The shape ``[M, N]``, ``[batch, M, N]``, or that of `out`.

    Raises:
        TypeError: If a dtype is another one.
        ValueError: If the shapes do not fit.

    Example:
        >>> A, B = torch.ones(2, 3, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8)
        >>> check_matmul(A, B, None, False, False)
        (2, 4)
    """
    _warn("check_matmul")
    return _check("check_matmul", A, B, out, transposed_A, transposed_B, expected_type)


def igemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> Tensor:
    """Multiplies int8 matrices exactly.

    Args:
        A: int8 ``[M, K]`` or ``[batch, M, K]``, of any strides.
        B: int8 ``[K, N]``, or ``[batch, K, N]`` for a product of each pair.
        out: int32 tensor that takes the product. If it is ``[K1, K2]`` for operands
            ``[batch, M, K1]`` and ``[batch, M, K2]``, the sum runs over batch and rows.
        transposed_A: Whether the last two dimensions of `A` change places first.
        transposed_B: The same for `B`.

    Returns:
        int32 ``[M, N]`` or ``[batch, M, N]``; `out` if given.

    Raises:
        TypeError: If an operand is not int8.
        ValueError: If the shapes do not fit.

    Example:
        >>> A = torch.tensor([[100, 2]], dtype=torch.int8)
        >>> igemm(A, A.t())
        tensor([[10004]], dtype=torch.int32)
    """
    _warn("igemm")
    return exact_product("igemm", A, B, out, transposed_A, transposed_B)


def batched_igemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> Tensor:
    """Multiplies the matrices of two batches exactly, pair by pair.

    Args:
        A: int8 ``[batch, M, K]``, of any strides.
        B: int8 ``[batch, K, N]``.
        out: int32 tensor ``[batch, M, N]`` that takes the products.
        transposed_A: Whether the last two dimensions of `A` change places first.
        transposed_B: The same for `B`.

    Returns:
        int32 ``[batch, M, N]``; `out` if given.

    Raises:
        TypeError: If an operand is not int8.
        ValueError: If an operand has not three dimensions, or the shapes do not fit.

    Example:
        >>> A = torch.tensor([[[100, 2]], [[1, 1]]], dtype=torch.int8)
        >>> batched_igemm(A, A, transposed_B=True).flatten()
        tensor([10004,     2], dtype=torch.int32)
    """
    _warn("batched_igemm")
    for argument, tensor in (("A", A), ("B", B)):
        if tensor.dim() != 3:
            raise ValueError(
                f"batched_igemm: {argument} must have 3 dimensions, got shape {list(tensor.shape)}"
            )
    return exact_product("batched_igemm", A, B, out, transposed_A, transposed_B)


def exact_product(
    name: str,
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> Tensor:
    """Returns what :func:`igemm` does; errors name the function `name`."""
    shape = _check(name, A, B, out, transposed_A, transposed_B)
    multiply = torch.ops.bitsandbytes.int8_linear_matmul.default
    if _is_contraction(A, B, out):
        return out.copy_(multiply(A.flatten(0, 1).t(), B.flatten(0, 1).t()))
    a, b = _turned(A, transposed_A), _turned(B, transposed_B)
    if b.dim() == 2:
        product = multiply(a, b.t())
    else:
        pairs = zip(a.unbind(), b.transpose(-2, -1).unbind(), strict=True)
        products = [multiply(left, right) for left, right in pairs]
        product = torch.cat(products or [a.new_empty(0, dtype=torch.int32)])
    product = product.view(shape) if math.prod(shape) else product.new_empty(shape)
    return product if out is None else out.copy_(product)
