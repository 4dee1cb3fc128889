# SPDX-License-Identifier: MIT
"""The product of groups of rows with a packed 4-bit weight for each group, with its gradients.

The experts of a mixture (Shazeer et al. 2017, arXiv:1701.06538): tokens are sorted by their expert,
and the rows of each expert are multiplied with its weight, of which all are one packed tensor.
"""

import torch
from torch import Tensor

from .._checks import FLOATS, OFFSETS, check, check_device, check_dtype, check_shape
from ..plain.grouped_gemm_4bit import bias_of_rows
from ..quant.scales import weight_arguments
from ..quant.state import QuantState
from .matmul4 import Product4bit, product_4bit

__all__ = ["grouped_matmul_4bit"]


def grouped_matmul_4bit(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    quant_state: QuantState | tuple | list,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Multiplies groups of rows with packed 4-bit weights ``[E, N, K]``, one for each group.

    As `torch.nn.functional.grouped_mm`, groups are told by where they end, in memory of the device:
    the host does not wait for it, and CUDA graphs can hold the call. Codes are multiplied as they
    are, those of groups that have rows. (For bfloat16 on CUDA, with many rows and backward, all
    weights are dequantized for torch's product, which is faster.) Weights are rounded to the dtype
    of `A` and sums are made in float32.

    Args:
        A: ``[M, K]``, rows sorted by group; float32, float16 or bfloat16.
        B: Packed codes of all weights, as :func:`bitsandbytes.functional.quantize_4bit` returns
            them.
        offs: int32 or int64 ``[E]``, ascending: group e has rows ``offs[e - 1]`` to
            ``offs[e] - 1``, the first group those from 0 on.
        quant_state: State of the codes, for a tensor of three dimensions.
        bias: Floating-point ``[E, N]``.
        transposed: The weights are ``[E, K, N]``, as gpt-oss has them.

    Returns:
        ``[M, N]`` in the dtype of `A`: ``A[i] @ W[e].T + bias[e]`` for the rows of group e, or
        ``A[i] @ W[e]`` with `transposed`; zeros in rows from ``offs[-1]`` on. Gradients flow to `A`
        and `bias`.

    Raises:
        ValueError: There is no state, or it is not that of a tensor of three dimensions.
        ValueError, RuntimeError: A dtype, a shape or a device does not fit; `offs` on a CPU does
            not ascend or exceeds M. On a GPU that gives results without meaning.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> experts = torch.stack([torch.eye(2), -torch.eye(2)])
        >>> packed, state = bnb.functional.quantize_4bit(experts, quant_type="nf4")
        >>> tokens = torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 8.0]])
        >>> bnb.grouped_matmul_4bit(tokens, packed, torch.tensor([2, 3]), state)
        tensor([[ 1.,  3.],
                [ 5.,  7.],
                [-9., -8.]])
    """
    name = "grouped_matmul_4bit"
    if quant_state is None:
        raise ValueError(f"{name}: quant_state must be given, got None")
    if isinstance(quant_state, (tuple, list)):
        quant_state = QuantState.from_list(quant_state)
    shape = quant_state.shape
    if shape is None or len(shape) != 3:
        got = None if shape is None else list(shape)
        check(False, name, "quant_state", "that of weights [E, N, K]", f"shape {got}")
    check_dtype(name, "A", A, *FLOATS)
    columns = shape[1 if transposed else 2]
    if A.dim() != 2 or A.shape[1] != columns:
        expected = f"[M, {columns}] for weights of shape {list(shape)}"
        check(False, name, "A", expected, f"shape {list(A.shape)}")
    check_dtype(name, "offs", offs, *OFFSETS)
    check_shape(name, "offs", offs, shape[:1])
    check_device(name, "offs", offs, "A", A)
    if bias is not None:
        check_shape(name, "bias", bias, (shape[0], shape[2 if transposed else 1]))
        check_device(name, "bias", bias, "A", A)

    if type(B) is not Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            B = B.detach()
    of_weight, nested = weight_arguments(quant_state, A.device)
    fused = None if transposed else bias
    wanted = A.requires_grad or (fused is not None and fused.requires_grad)
    product = Product4bit.apply if wanted and torch.is_grad_enabled() else product_4bit
    result = product(A, fused, (B, *of_weight, *nested), transposed, offs)
    if bias is not None and transposed:
        # The product of the backward pass has no bias.
        result = result + bias_of_rows(bias, offs, A.shape[0]).to(A.dtype)
    return result
