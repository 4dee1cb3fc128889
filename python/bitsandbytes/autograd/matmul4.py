# SPDX-License-Identifier: MIT
"""The product of activations and a packed 4-bit weight, with its gradients.

Forward (Dettmers et al. 2023, arXiv:2305.14314, section 3), for activations A, packed codes B and
the weight W that they stand for: ``out = A W^T + bias``. Backward: ``dA = dout W``. Neither holds W
in memory, and A is not kept for the backward pass: the weight is frozen.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import FLOATS, check, check_output, check_shape
from .._precision import full_precision
from ..plain.grouped_gemm_4bit import group_of_rows
from ..quant.four_bit import dequantize_4bit
from ..quant.scales import weight_arguments
from ..quant.state import QuantState

__all__ = ["Product4bit", "matmul_4bit", "product_4bit"]

_gemm_4bit = torch.ops.bitsandbytes.gemm_4bit.default
_gemm_4bit_dgrad = torch.ops.bitsandbytes.gemm_4bit_dgrad.default
_grouped_gemm_4bit = torch.ops.bitsandbytes.grouped_gemm_4bit.default
_grouped_gemm_4bit_dgrad = torch.ops.bitsandbytes.grouped_gemm_4bit_dgrad.default


class Product4bit(torch.autograd.Function):
    """Differentiable product with the weight of shape ``[N, K]`` that `packed` stands for.

    `backwards` False: ``[..., K]`` to ``[..., N]``, plus the bias. True: ``[..., N]`` to
    ``[..., K]``, the gradient of the former, so that each is the other's backward pass.

    With `offs`, the ends of groups of rows, there is a weight and a bias for each group.
    """

    @staticmethod
    def forward(ctx, A, bias, weight, backwards, offs=None):
        """Computes the product of A in A's dtype; `weight` as for :func:`product_4bit`."""
        packed, shape, scales, blocksize, quant_type, *nested = weight
        ctx.save_for_backward(packed, scales, offs, *nested)
        ctx.rest = shape, blocksize, quant_type, backwards, None if bias is None else bias.dtype
        return product_4bit(A, bias, weight, backwards, offs)

    @staticmethod
    def backward(ctx, grad):
        """Returns the gradients of `A` and `bias`; the weight has none."""
        packed, scales, offs, *nested = ctx.saved_tensors
        shape, blocksize, quant_type, backwards, bias_dtype = ctx.rest
        needs_A, needs_bias = ctx.needs_input_grad[:2]
        grad_A = grad_bias = None
        if needs_A:
            weight = (packed, shape, scales, blocksize, quant_type, *nested)
            # Gradients of gradients, which hardly anybody wants, are recorded like the first.
            product = Product4bit.apply if torch.is_grad_enabled() else product_4bit
            grad_A = product(grad, None, weight, not backwards, offs)
        if needs_bias:
            flat = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
            wide = torch.promote_types(grad.dtype, bias_dtype)
            if offs is None:
                sums = flat.sum(0, dtype=wide)
            else:
                # The last line collects rows of no group.
                sums = flat.new_zeros(offs.numel() + 1, flat.shape[1], dtype=wide)
                sums = sums.index_add_(0, group_of_rows(offs, flat.shape[0]), flat.to(wide))[:-1]
            grad_bias = sums.to(bias_dtype)
        return grad_A, grad_bias, None, None, None


def product_4bit(
    A: Tensor, bias: Tensor | None, weight: tuple, backwards: bool, offs: Tensor | None = None
) -> Tensor:
    """Returns the product of A with a weight or, `backwards`, with its transpose.

    `weight`: what the ops take for it, from packed codes to the parts of nested scales. Every
    argument takes its time on the way to a kernel, so what is not there is not passed. `offs`: as
    for :class:`Product4bit`.
    """
    if offs is not None:
        packed, *rest = weight
        if backwards:
            return _grouped_gemm_4bit_dgrad(A, packed, offs, *rest)
        bias = None if bias is None else bias.to(A.dtype)
        return _grouped_gemm_4bit(A, packed, offs, *rest[:4], bias, *rest[4:])
    if backwards:
        return _gemm_4bit_dgrad(A, *weight)
    if bias is None and len(weight) == 5:
        return _gemm_4bit(A, *weight)
    if bias is not None and bias.dtype != A.dtype:
        bias = bias.to(A.dtype)
    return _gemm_4bit(A, *weight[:5], bias, *weight[5:])


def _product_dequantized(A: Tensor, B: Tensor, bias: Tensor | None, state: QuantState) -> Tensor:
    """Returns what the kernels do not make, by way of the whole weight, or says what is wrong.

    The weight is turned around where A fits it that way.
    """
    name, shape = "matmul_4bit", state.shape
    if shape is None or len(shape) != 2:
        got = None if shape is None else list(shape)
        check(False, name, "quant_state", "that of a matrix [N, K]", f"shape {got}")
    check(A.is_floating_point(), name, "A", "floating point", A.dtype)
    check(A.dim() >= 1, name, "A", "of at least one dimension", "a scalar")
    turned = A.shape[-1] != shape[1]
    if turned:
        if A.shape[-1] != shape[0]:
            expected = f"[..., {shape[1]}] for a weight of shape {list(shape)}"
            check(False, name, "A", expected, f"shape {list(A.shape)}")
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"{name}: the weight was quantized as [K, N]. Re-quantize from the weight as "
                "[N, K]; until then it is dequantized for each product",
                DeprecationWarning,
                stacklevel=3,
            )
    if bias is not None:
        check_shape(name, "bias", bias, (shape[1 if turned else 0],))
    wide = A.dtype if A.dtype in FLOATS else torch.float32
    state = QuantState(
        *(state.absmax, state.shape, state.levels(), state.blocksize, state.quant_type, wide),
        *(state.offset, state.state2),
    )
    weight = dequantize_4bit(B.reshape(-1, 1), state).to(A.dtype)
    if turned:
        weight = weight.t()
    with full_precision(A.device):
        return F.linear(A, weight, None if bias is None else bias.to(A.dtype))


def _state_of(quant_state: QuantState | tuple | list | None) -> QuantState:
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state must be given, got None")
    if isinstance(quant_state, (tuple, list)):
        return QuantState.from_list(quant_state)
    return quant_state


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState | tuple | list,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiplies activations with a packed 4-bit weight ``[N, K]``.

    The weight is rounded to the dtype of `A` and sums are made in float32. Autocast does not
    change the dtype; the layers have a `compute_dtype` for that.

    Args:
        A: Activations ``[..., K]``; float32, float16 or bfloat16. float64 is computed with the
            whole weight dequantized.
        B: Packed codes as :func:`bitsandbytes.functional.quantize_4bit` returns them, or their
            transpose.
        quant_state: State of the codes. The lists of bitsandbytes 0.41 and older are read as well.
        out: Tensor ``[..., N]`` that takes the result.
        bias: Floating-point vector ``[N]``.

    Returns:
        ``A @ W.T + bias``, ``[..., N]`` in the dtype of `A`, or `out`. Gradients flow to `A` and
        `bias`.

    Raises:
        ValueError: There is no state, or it is not that of a matrix.
        ValueError, RuntimeError: A dtype, a shape or a device does not fit.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> packed, state = bnb.functional.quantize_4bit(torch.eye(2), quant_type="nf4")
        >>> bnb.matmul_4bit(torch.tensor([[3.0, 5.0]]), packed, state)
        tensor([[3., 5.]])
    """
    if type(quant_state) is not QuantState:
        quant_state = _state_of(quant_state)
    shape = quant_state.shape
    # What follows is all the work that a call has on the host but for the op.
    fits = shape is not None and len(shape) == 2 and A.dim() > 0 and A.shape[-1] == shape[1]
    if not fits or A.dtype not in FLOATS:
        result = _product_dequantized(A, B, bias, quant_state)
    else:
        of_weight, nested = weight_arguments(quant_state, A.device)
        # The parameter's class has Python code behind every operation, which takes its time.
        if type(A) is Tensor and not torch.is_grad_enabled():
            with torch._C.DisableTorchFunctionSubclass():
                result = product_4bit(A, bias, (B, *of_weight, *nested), False)
        else:
            if type(B) is not Tensor:
                with torch._C.DisableTorchFunctionSubclass():
                    B = B.detach()
            wanted = A.requires_grad or (bias is not None and bias.requires_grad)
            product = Product4bit.apply if wanted and torch.is_grad_enabled() else product_4bit
            result = product(A, bias, (B, *of_weight, *nested), False)
    if out is None:
        return result
    check_output("matmul_4bit", "out", out, result.shape)
    return out.copy_(result)
