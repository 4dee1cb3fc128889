# SPDX-License-Identifier: MIT
"""The LLM.int8() product of activations and a quantized weight, with its gradients.

Forward (Dettmers et al. 2022, arXiv:2208.07339), for activations A and weight codes CB with
statistics SCB: A is quantized row by row, ``out = CA CB^T * SCA SCB / 127^2 + bias``, and columns
of A that hold an outlier are multiplied in floating point. The gradient treats the quantization
of A as the identity: ``dA = dout W``, with ``W = CB * SCB / 127``.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import AUTOCAST_DEVICES, FLOATS, check, check_device, check_output, check_shape

__all__ = [
    "GlobalOutlierPooler",
    "MatmulLtState",
    "Product8bit",
    "dequantized",
    "matmul",
    "narrowed",
]

_int8_linear = torch.ops.bitsandbytes.int8_linear.default
_int8_linear_dgrad = torch.ops.bitsandbytes.int8_linear_dgrad.default


class _RemovedField:
    """An attribute that is None, and says so, until it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, state: Any, owner: type) -> None:
        warnings.warn(
            f"MatmulLtState.{self._name} is always None: int8 weights have one layout, CB and SCB",
            FutureWarning,
            stacklevel=2,
        )


@dataclass
class MatmulLtState:
    """What :func:`matmul` keeps between calls for one weight.

    Attributes:
        CB: int8 codes of the weight ``[N, K]``.
        SCB: float32 statistics of the weight ``[N]``.
        idx: Outlier columns of the last activations, int64; None without a threshold. They are
            counted when somebody asks, which waits for the device.
        threshold: Magnitude from which an activation is an outlier; 0 for none.
        is_training: Whether the weight may have changed since the last call, and whether the CPU
            multiplies with the dequantized weight instead of quantizing the activations.
        has_fp16_weights: Whether the weight of the call is the master copy, so that `CB` and
            `SCB` are derived from it again; otherwise they are the weight.

    The other attributes exist for programs written for earlier releases and have no effect.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: Any = None
    idx: Tensor | None = None

    # Without annotations, so that they are attributes and not arguments of the constructor.
    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False
    # Address and version of the weight that CB and SCB were made from.
    _source = None
    # Where `idx` is, or what it is counted from.
    _idx = None
    _outlier_mask = None

    # Names of tensor layouts of bitsandbytes before 0.45, which callers may still look at.
    CxB = _RemovedField()
    CxBt = _RemovedField()
    formatB = _RemovedField()
    _tile_indices = _RemovedField()

    def reset_grads(self) -> None:
        """Forgets the quantized weight, so that the next call quantizes the weight it gets."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None


def _get_idx(state: MatmulLtState) -> Tensor | None:
    if state._idx is None and state._outlier_mask is not None:
        state._idx = state._outlier_mask.nonzero().flatten()
    return state._idx


def _set_idx(state: MatmulLtState, idx: Tensor | None) -> None:
    state._idx, state._outlier_mask = idx, None


# Behind the back of dataclass, for which `idx` is a field like the others.
MatmulLtState.idx = property(_get_idx, _set_idx)  # type: ignore[assignment]


class GlobalOutlierPooler:
    """Collects outlier columns of the layers of one width. Kept for import; nothing uses it."""

    _instance: ClassVar[Optional["GlobalOutlierPooler"]] = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOutlierPooler is one object: use get_instance()")

    @classmethod
    def get_instance(cls) -> "GlobalOutlierPooler":
        """Returns the one pooler of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._columns = set()
            cls._instance._width = None
        return cls._instance

    _columns: set[int]
    _width: int | None

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Adds columns of a layer with `feature_dim` inputs; only the first width seen counts."""
        if self._width is None:
            self._width = feature_dim
        if feature_dim == self._width:
            self._columns.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """Returns all columns added so far, int64 and ascending."""
        return torch.tensor(sorted(self._columns), dtype=torch.int64)


def dequantized(CB: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values of int8 codes with a statistic for every row."""
    dequantize = torch.ops.bitsandbytes.int8_vectorwise_dequant
    if dtype not in FLOATS:
        return dequantize.default(CB, SCB).to(dtype)
    return dequantize.dtype(CB, SCB, dtype)


def times_dequantized(grad: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    """Returns ``grad @ W`` with W, of codes ``[N, K]``, in the dtype of `grad`."""
    recorded = grad.requires_grad and torch.is_grad_enabled()
    if recorded or grad.dtype not in FLOATS:
        return grad @ dequantized(CB, SCB, grad.dtype)
    return _int8_linear_dgrad(grad, CB, SCB)


def narrowed(tensor: Tensor) -> Tensor:
    """Returns what the int8 ops take: they know no float64, a layer may."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _product(
    A: Tensor, bias: Tensor | None, CB: Tensor, SCB: Tensor, threshold: float | None
) -> tuple[Tensor, Tensor | None]:
    """Returns ``A W^T + bias`` in A's dtype, and the mask of outlier columns if there is one.

    Without a threshold (None, not 0) the activations are not quantized.
    """
    if threshold is None:
        if bias is not None:
            check_shape("matmul", "bias", bias, CB.shape[:1])
            bias = bias.to(A.dtype)
        return F.linear(A, dequantized(CB, SCB, A.dtype), bias), None
    bias = None if bias is None else narrowed(bias)
    out, outlier_mask = _int8_linear(narrowed(A), CB, SCB, bias, threshold)
    # Not a conversion to the same dtype: torch.compile of torch 2.11 loses the gradient behind one.
    return out if out.dtype == A.dtype else out.to(A.dtype), outlier_mask


class Product8bit(torch.autograd.Function):
    """Differentiable form of the product; `B` is the weight that `CB` and `SCB` stand for, or None.

    Without a `B` there is no gradient of a weight.
    """

    @staticmethod
    def forward(ctx, A, B, bias, CB, SCB, threshold):
        """Computes the product; see :func:`_product` for the arguments."""
        # A is needed for the gradient of the weight only: frozen weights keep no activations.
        ctx.save_for_backward(None if B is None else A, CB, SCB)
        ctx.dtypes = None if B is None else B.dtype, None if bias is None else bias.dtype
        out, outlier_mask = _product(A, bias, CB, SCB, threshold)
        if outlier_mask is not None:
            ctx.mark_non_differentiable(outlier_mask)
            if not torch.compiler.is_compiling():  # which does not know this, and fills nothing
                ctx.set_materialize_grads(False)  # zeros for the mask
        return out, outlier_mask

    @staticmethod
    def backward(ctx, grad, _):
        """Returns the gradients of `A`, `B` and `bias`, each in its own dtype."""
        needs_A, needs_B, needs_bias = ctx.needs_input_grad[:3]
        grad_A = grad_B = grad_bias = None
        if grad is not None:
            A, CB, SCB = ctx.saved_tensors
            if needs_A:
                grad_A = times_dequantized(grad, CB, SCB)
            if needs_B or needs_bias:
                B_dtype, bias_dtype = ctx.dtypes
                rows = math.prod(grad.shape[:-1])
                flat = grad.reshape(rows, grad.shape[-1])
            if needs_B:
                grad_B = (flat.t() @ A.reshape(rows, A.shape[-1])).to(B_dtype)
            if needs_bias:
                wide = torch.promote_types(flat.dtype, bias_dtype)
                grad_bias = flat.sum(0, dtype=wide).to(bias_dtype)
        return grad_A, grad_B, grad_bias, None, None, None


def _source(B: Tensor) -> tuple[int, int] | None:
    """Returns what changes when the weight does, or None where that cannot be told."""
    if torch.compiler.is_compiling() or B.is_inference():
        return None
    return B.data_ptr(), B._version


def _quantized_weight(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """Returns CB and SCB, from the state where they are there and still those of the weight."""
    if state.CB is not None and not state.has_fp16_weights:
        if state.SCB is None:
            check(False, "matmul", "state.SCB", "set along with state.CB", None)
        return state.CB, state.SCB
    check(B.is_floating_point(), "matmul", "B", "floating point unless state.CB is set", B.dtype)
    source = _source(B) if state.has_fp16_weights else None
    if source is not None and source == state._source and state.CB is not None:
        # While gradients accumulate, or outside training, an unchanged weight keeps its codes.
        if not state.is_training or (B.is_leaf and B.grad is not None):
            return state.CB, state.SCB
    # Not as inference tensors, because training may come later.
    with torch.inference_mode(False), torch.no_grad():
        CB, SCB, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(narrowed(B))
    if source is not None or not state.has_fp16_weights:
        state.CB, state.SCB, state._source = CB, SCB, source
    return CB, SCB


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiplies activations with a weight in int8: LLM.int8().

    On the CPU a state with ``is_training`` multiplies with the dequantized weight and does not
    quantize the activations. Under autocast the product is computed in autocast's dtype, as that
    of :class:`torch.nn.Linear` is.

    Args:
        A: Floating-point activations ``[..., K]``.
        B: Weight ``[N, K]``. With ``state.CB`` set and not ``state.has_fp16_weights``, `B` is not
            read, and only receives a gradient if it requires one.
        out: Tensor ``[..., N]`` that takes the result.
        state: Quantized weight and options; None quantizes `B` for this call.
        threshold: Magnitude from which an activation is an outlier; a positive one replaces
            ``state.threshold``.
        bias: Floating-point vector ``[N]``.

    Returns:
        ``A @ B.T + bias``, ``[..., N]`` in the dtype of `A`, or `out`. Gradients flow to `A`,
        `bias` and `B`.

    Raises:
        ValueError: If a dtype, a shape or a device does not fit.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> A, B = torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, -4.0]])
        >>> state = bnb.MatmulLtState()
        >>> state.is_training = False
        >>> [[round(x, 1) for x in row] for row in bnb.matmul(A, B, state=state).tolist()]
        [[1.0, 3.0], [2.0, -4.0]]
    """
    if state is None:
        state = MatmulLtState()
    if threshold > 0:
        state.threshold = threshold
    if not A.is_floating_point():
        check(False, "matmul", "A", "floating point", A.dtype)
    if A.dim() < 1:
        check(False, "matmul", "A", "of at least one dimension", "a scalar")
    device = A.device
    kind = device.type
    if kind in AUTOCAST_DEVICES and A.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        A = A.to(torch.get_autocast_dtype(kind))

    CB, SCB = _quantized_weight(B, state)
    if CB.device != device:
        check_device("matmul", "the weight", CB, "A", A)
    if CB.dim() != 2 or CB.shape[1] != A.shape[-1]:
        expected = f"[N, {A.shape[-1]}] for A of shape {list(A.shape)}"
        check(False, "matmul", "the weight", expected, list(CB.shape))

    if out is not None:
        check_output("matmul", "out", out, (*A.shape[:-1], CB.shape[0]))

    dense = state.is_training and kind in ("cpu", "xpu")
    limit = None if dense else state.threshold
    trained = B.requires_grad
    if torch.is_grad_enabled() and (
        A.requires_grad or trained or (bias is not None and bias.requires_grad)
    ):
        weight = B if trained else None
        result, outlier_mask = Product8bit.apply(A, weight, bias, CB, SCB, limit)
    else:
        result, outlier_mask = _product(A, bias, CB, SCB, limit)
    state._idx, state._outlier_mask = None, outlier_mask
    return result if out is None else out.copy_(result)
