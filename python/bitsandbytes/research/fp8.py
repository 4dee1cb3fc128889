# SPDX-License-Identifier: MIT
"""Products of operands rounded to FP8: simulated, with the products in the dtype of the operands.

Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language
models", https://arxiv.org/abs/2304.13013, section 2.2.
"""

import itertools

import torch
from torch import Tensor

from ..quant.blockwise import dequantize_blockwise, quantize_blockwise
from ..quant.tensorwise import dequantize, quantize

__all__ = ["block_size_of", "matmul_fp8_global", "matmul_fp8_mixed"]

BLOCK_SIZES = (4096, 2048, 1024, 512, 256, 128, 64)


def block_size_of(features: int) -> int:
    """Returns the block size for rows of so many numbers: the least that holds one, 64 to 4096."""
    for size, smaller in itertools.pairwise(BLOCK_SIZES):
        if features > smaller:
            return size
    return BLOCK_SIZES[-1]


def _round_blocks(x: Tensor, code: Tensor, block_size: int) -> Tensor:
    codes, state = quantize_blockwise(x, code, blocksize=block_size)
    return dequantize_blockwise(codes, state).to(x.dtype)


def _round_tensor(x: Tensor, code: Tensor) -> Tensor:
    codes, state = quantize(x.float(), code)
    return dequantize(codes, state).to(x.dtype)


class MatMulFP8(torch.autograd.Function):
    """Differentiable form of both products."""

    @staticmethod
    def forward(ctx, A, B, fw_code, bw_code, bsz, bsz2):
        """Computes the product of rounded operands; a block size of None means one scale."""
        rounded_A = _round_tensor(A, fw_code) if bsz is None else _round_blocks(A, fw_code, bsz)
        rounded_B = _round_tensor(B, fw_code)
        # With one scale for everything the gradient of B sees the rounded operands as well.
        ctx.save_for_backward(A if bsz2 is not None else rounded_A, rounded_B, bw_code)
        ctx.bsz2 = bsz2
        return rounded_A @ rounded_B

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradients of `A` and `B`."""
        A, B, code = ctx.saved_tensors
        grad_A = grad_B = None
        if ctx.bsz2 is None:
            rounded = _round_tensor(grad, code)
        else:
            rounded = _round_blocks(grad, code, ctx.bsz2)
        if ctx.needs_input_grad[0]:
            grad_A = rounded @ B.t()
        if ctx.needs_input_grad[1]:
            right = rounded if ctx.bsz2 is None else grad
            grad_B = A.reshape(-1, A.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
        return grad_A, grad_B, None, None, None, None


def _check(name: str, A: Tensor, B: Tensor) -> None:
    if B.dim() != 2 or A.dim() < 1 or A.shape[-1] != B.shape[0]:
        raise ValueError(
            f"{name}: B must be [K, N] for A of shape {list(A.shape)}, got {list(B.shape)}"
        )


def matmul_fp8_mixed(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """Multiplies operands rounded to FP8: `A` by blocks, `B` with one scale.

    The gradient of `A` is a product of the gradient, rounded by blocks, and the rounded `B`; the
    gradient of `B` one of operands that are not rounded.

    Args:
        A: Floating-point activations ``[..., K]``.
        B: Floating-point weight ``[K, N]``.
        fw_code: float32 levels for the forward pass, as
            ``create_fp8_map(True, 4, 3, 8)``.
        bw_code: float32 levels for the gradient, as ``create_fp8_map(True, 5, 2, 8)``.
        out: Tensor that takes the result.
        bsz: Block size for `A`; -1 for one that holds K numbers, 64 to 4096.
        bsz2: Block size for the gradient; -1 for one that holds N numbers.

    Returns:
        The product ``[..., N]``; `out` if given.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> code = bnb.functional.create_fp8_map(True, 4, 3, 8)
        >>> bnb.research.matmul_fp8_mixed(torch.eye(2), torch.eye(2) * 3, code, code)
        tensor([[3., 0.],
                [0., 3.]])
    """
    _check("matmul_fp8_mixed", A, B)
    bsz = block_size_of(B.shape[0]) if bsz == -1 else bsz
    bsz2 = block_size_of(B.shape[1]) if bsz2 == -1 else bsz2
    result = MatMulFP8.apply(A, B, fw_code, bw_code, bsz, bsz2)
    return result if out is None else out.copy_(result)


def matmul_fp8_global(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    out: Tensor | None = None,
    bsz: int = -1,
    bsz2: int = -1,
) -> Tensor:
    """Multiplies operands rounded to FP8, each with one scale.

    Both gradients are products of rounded operands. Arguments, results and errors are those of
    :func:`matmul_fp8_mixed`, without effect of the block sizes.

    Example:
        >>> code = bnb.functional.create_fp8_map(True, 4, 3, 8)
        >>> bnb.research.matmul_fp8_global(torch.eye(2), torch.eye(2) * 3, code, code)
        tensor([[3., 0.],
                [0., 3.]])
    """
    _check("matmul_fp8_global", A, B)
    result = MatMulFP8.apply(A, B, fw_code, bw_code, None, None)
    return result if out is None else out.copy_(result)
