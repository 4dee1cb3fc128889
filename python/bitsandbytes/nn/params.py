# SPDX-License-Identifier: MIT
"""Parameters that quantize themselves when they are moved to a device."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import _ops  # noqa: F401  (registers the ops)
from .._checks import FLOATS, check

__all__ = ["Int8Params", "cast_bias", "device_of", "own_tensor", "without_parameter"]


class Int8Params(nn.Parameter):
    """Weight of a linear layer that becomes row-wise int8 when it leaves or is sent to the CPU.

    A floating-point weight on the CPU is quantized, in place, by ``.to(device)``, ``.cpu()`` and
    ``.cuda()``, also if that device is the CPU, but not if it is "meta". From then on the
    parameter holds the codes, keeps their dtype whatever cast is asked for, and moves along with
    its statistics.

    Args:
        data: Floating-point weight ``[N, K]`` or int8 codes of one.
        requires_grad: Whether the weight is trained, which needs `has_fp16_weights`.
        has_fp16_weights: Whether the weight stays in floating point when it moves.
        CB: int8 codes; after quantization the same memory as `data`.
        SCB: float32 statistics of the codes, ``[N]``: a code is worth ``SCB / 127``.
        **ignored: Attributes that other packages keep on the parameter and hand back.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> weight = bnb.nn.Int8Params(torch.tensor([[1.0, -2.0]]), requires_grad=False).to("cpu")
        >>> weight.data, weight.SCB
        (tensor([[  64, -127]], dtype=torch.int8), tensor([2.]))
    """

    # The instance holds these three and nothing else: `Int8Params(data, **old.__dict__)` is how
    # other packages copy a parameter.
    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **ignored: Any,
    ) -> "Int8Params":
        """Makes the parameter; `data` is neither copied nor quantized."""
        if data is None:
            data = torch.empty(0)
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.CB = CB
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        return self

    def to(self, *args, **kwargs):
        """Moves the weight as :meth:`torch.Tensor.to` does, and quantizes it on the way.

        Returns:
            This parameter if it was quantized now or nothing changed, otherwise a new one.

        Raises:
            RuntimeError: If a weight that requires a gradient would be quantized.
            ValueError: If the weight to quantize is not a floating-point matrix.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.dtype == torch.int8:
            return self if device is None else self._moved(device, non_blocking)
        leaves = device is not None and device.type != "meta" and self.device.type == "cpu"
        if leaves and not self.has_fp16_weights:
            return self._quantized(device)
        moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
        if moved is self or (moved.device == self.device and moved.grad_fn is not None):
            return moved  # nothing to do, or a cast inside a graph that gradients flow through
        return Int8Params(
            moved.detach(), self.requires_grad, self.has_fp16_weights, self.CB, self.SCB
        )

    def cpu(self):
        """Returns ``self.to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device=None, non_blocking=False):
        """Returns ``self.to(device)``, by default the current CUDA device."""
        return self.to(device_of("cuda", device), non_blocking=non_blocking)

    def xpu(self, device=None, non_blocking=False):
        """Returns ``self.to(device)``, by default the current XPU device."""
        return self.to(device_of("xpu", device), non_blocking=non_blocking)

    def _quantized(self, device: torch.device) -> "Int8Params":
        op = "Int8Params.to"
        if self.requires_grad:
            raise RuntimeError(
                f"{op}: a weight with requires_grad=True cannot become int8; set requires_grad to "
                "False, or has_fp16_weights to True to keep it in floating point"
            )
        check(self.dim() == 2, op, "the weight", "a matrix", f"shape {list(self.shape)}")
        check(self.is_floating_point(), op, "the weight", "floating point or int8", self.dtype)
        weight = self.data.to(device)
        if weight.dtype == torch.float64:
            weight = weight.float()
        codes, stats, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight)
        self.data = self.CB = codes
        self.SCB = stats
        return self

    def _moved(self, device: torch.device, non_blocking: bool) -> "Int8Params":
        codes = self.data.to(device, non_blocking=non_blocking)
        # Statistics without values stay where they are, so that using them is an error.
        stats = self.SCB if self.SCB is None or self.SCB.is_meta else self.SCB.to(codes.device)
        return Int8Params(codes, self.requires_grad, self.has_fp16_weights, codes, stats)

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        # The memo keeps the codes one tensor: data and CB share their storage in the copy too.
        copied = Int8Params(copy.deepcopy(self.data, memo), self.requires_grad)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol):
        attributes = dict(self.__dict__)
        shared = self.CB is not None and self.CB.data_ptr() == self.data_ptr()
        if shared:
            attributes["CB"] = None
        return _rebuild, (self.data, self.requires_grad, attributes, shared)


def _rebuild(data: Tensor, requires_grad: bool, attributes: dict, shared: bool) -> Int8Params:
    """Makes an unpickled or copied parameter, with codes that share its memory if they did."""
    param = Int8Params(data, requires_grad)
    param.__dict__.update(attributes)
    if shared:
        param.CB = param.data
    return param


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Returns the parameter `name` of a layer, or what other code has put in its place.

    In a fifth of the time of the attribute, which torch.nn.Module looks for elsewhere first.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def cast_bias(layer: nn.Module, bias: Tensor, dtype: torch.dtype) -> None:
    """Compat: the bias of a layer follows the dtype of its products, for good."""
    dtypes = (*FLOATS, torch.float64)
    expected = "float16, bfloat16, float32 or float64"
    check(dtype in dtypes, type(layer).__name__, "x", expected, dtype)
    bias.data = bias.data.to(dtype)


def device_of(kind: str, device: torch.device | str | int | None) -> torch.device:
    """Returns the device that ``tensor.cuda(device)`` and its like mean."""
    if device is None:
        return torch.device(kind)
    return torch.device(kind, device) if isinstance(device, int) else torch.device(device)


@contextmanager
def without_parameter(module: nn.Module, name: str) -> Iterator[None]:
    """Hides a parameter from torch.nn.Module, which would not keep its class."""
    param = module._parameters[name]
    module._parameters[name] = None
    try:
        yield
    finally:
        module._parameters[name] = param
