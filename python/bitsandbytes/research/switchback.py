# SPDX-License-Identifier: MIT
"""SwitchBack in the shape of :func:`bitsandbytes.matmul`."""

from torch import Tensor

from ..autograd.matmul import MatmulLtState
from ..autograd.switchback import switchback

__all__ = ["switchback_bnb"]


def switchback_bnb(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiplies activations with a weight that is trained: SwitchBack with a scale per row.

    Args:
        A: Floating-point activations ``[..., K]``.
        B: Floating-point weight ``[N, K]``.
        out: Tensor that takes the result.
        state: Not used: the weight is quantized in every call.
        threshold: Not used.
        bias: Floating-point vector ``[N]``.

    Returns:
        ``A @ B.T + bias``, ``[..., N]`` in the dtype of `A`; `out` if given.

    Example:
        >>> bnb.research.switchback_bnb(torch.eye(2), torch.tensor([[127.0, 1], [3, 127]]))
        tensor([[127.,   3.],
                [  1., 127.]])
    """
    result = switchback(A, B, bias, vectorwise=True)
    return result if out is None else out.copy_(result)
