# SPDX-License-Identifier: MIT
"""The parameter that holds packed 4-bit codes together with their scales."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..quant.four_bit import BLOCKSIZE, quantize_4bit
from ..quant.state import QuantState
from .params import device_of
from .state4 import are_codes_of, move_state, read_state

if TYPE_CHECKING:
    from .module4 import Module4bit

__all__ = ["Params4bit"]


def _no_attribute(name: str) -> AttributeError:
    return AttributeError(f"'Params4bit' object has no attribute '{name}'")


def _from_state(name: str, field: str, nested: bool = False) -> property:
    """Returns a read-only property for `field` of the state, or of the state of its scales."""

    def get(self):
        state = self.quant_state
        if state is not None and nested:
            state = state.state2
        if state is None:
            raise _no_attribute(name)
        return getattr(state, field)

    return property(get, doc=f"`{field}` of the quantization state.")


def _are_numbers_of(state: QuantState | list, data: Tensor) -> bool:
    """Whether `data` is a weight as it was before it was packed to the codes of `state`."""
    if not isinstance(state, QuantState) or data.shape != state.shape:
        return False
    return data.is_floating_point() and not are_codes_of(state, data)


class Params4bit(nn.Parameter):
    """Weight that becomes packed 4-bit codes when it is moved to a device, also to the CPU.

    ``.to(device)``, ``.cpu()`` and ``.cuda()`` quantize a floating-point weight in place, unless
    the device is "meta". From then on the parameter holds bytes, keeps them whatever dtype is
    asked for, and moves along with its state.

    Parts of the state are also attributes of the parameter (`absmax`, `code`, `quant_map`,
    `offset`, `state2`, `nested_absmax`, `nested_blocksize`, `nested_quant_map`, `nested_dtype`,
    `nested_offset`): torch.distributed looks up the keys of a state dict like that.

    Args:
        data: Floating-point weight of any shape (float32, float16 or bfloat16), or packed codes.
        requires_grad: Packed codes are never trained; True is refused when quantizing.
        quant_state: State of packed codes.
        blocksize: Elements that share a scale: 32, 64, 128 ... 4096. Default: 64.
        compress_statistics: Quantize the scales as well.
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are held in.
        module: Layer whose attribute `quant_state` follows the state.
        bnb_quantized: Whether `data` holds packed codes.
        **ignored: Attributes that other packages keep on the parameter and hand back.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> weight = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
        >>> weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=False)
        >>> weight = weight.to("cpu")
        >>> weight.data.flatten().tolist(), weight.absmax.tolist()
        ([240, 199], [1.0])
    """

    # The instance holds these seven and nothing else: `Params4bit(data, **old.__dict__)` is how
    # other packages copy a parameter.
    blocksize: int
    compress_statistics: bool | None
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: "Module4bit | None"

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: "Module4bit | None" = None,
        bnb_quantized: bool = False,
        **ignored: Any,
    ) -> "Params4bit":
        """Makes the parameter; `data` is neither copied nor quantized."""
        if data is None:
            data = torch.empty(0)
        if bnb_quantized and quant_state is not None and _are_numbers_of(quant_state, data):
            # Numbers with the attributes of the codes that they replace, as when merging adapters.
            quant_state, bnb_quantized = None, False
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.blocksize = BLOCKSIZE if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    # Properties instead of __getattr__, which torch.compile cannot trace in a tensor's class.
    absmax = _from_state("absmax", "absmax")
    code = _from_state("code", "code")
    quant_map = _from_state("quant_map", "code")
    offset = _from_state("offset", "offset")
    state2 = _from_state("state2", "state2")
    nested_absmax = _from_state("nested_absmax", "absmax", nested=True)
    nested_blocksize = _from_state("nested_blocksize", "blocksize", nested=True)
    nested_quant_map = _from_state("nested_quant_map", "code", nested=True)
    nested_dtype = _from_state("nested_dtype", "dtype", nested=True)
    nested_offset = _from_state("nested_offset", "offset")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Lets the pieces of torch.chunk and torch.split keep the class, as FSDP needs."""
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func is not torch.chunk and func is not torch.split:
            return result
        source = args[0] if args else next(v for v in kwargs.values() if isinstance(v, cls))
        attributes = dict(source.__dict__)
        return tuple(cls(piece, source.requires_grad, **attributes) for piece in result)

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int = "cuda",
        module: "Module4bit | None" = None,
        **ignored: Any,
    ) -> "Params4bit":
        """Makes the parameter from packed codes and the entries that a checkpoint has for them.

        Args:
            data: Packed codes, of any dtype that they can be stored in.
            quantized_stats: What :meth:`QuantState.as_dict` gave, packed or not; a dotted prefix
                of the keys does not matter.
            requires_grad: Kept on the parameter; packed codes are never trained.
            device: Where the codes and their state go.
            module: Layer whose attribute `quant_state` becomes the state.
            **ignored: For programs that pass more.

        Returns:
            The quantized parameter.

        Raises:
            ValueError: There is not exactly one packed entry of a known type.
            AssertionError: An entry is unknown.

        Example:
            >>> import torch
            >>> import bitsandbytes as bnb
            >>> packed, state = bnb.functional.quantize_4bit(torch.ones(8, 8), quant_type="nf4")
            >>> entries = state.as_dict(packed=True)
            >>> weight = bnb.nn.Params4bit.from_prequantized(packed, entries, device="cpu")
            >>> weight.quant_type, weight.quant_state.shape
            ('nf4', torch.Size([8, 8]))
        """
        state = read_state(quantized_stats, device)
        self = cls(data.to(device), requires_grad, module=module)
        self._hold(state)
        self.quant_storage = data.dtype
        if module is not None:
            module.quant_storage = data.dtype
        return self

    def _hold(self, state: QuantState) -> None:
        """Takes `state` for the state of the codes that `data` holds."""
        self.quant_state = state
        self.blocksize = state.blocksize
        self.compress_statistics = state.nested
        self.quant_type = state.quant_type
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state

    # --- moving -----------------------------------------------------------------------------

    def to(self, *args, **kwargs):
        """Moves the weight as :meth:`torch.Tensor.to` does, and quantizes it on the way.

        Returns:
            This parameter if it was quantized now or nothing changed, otherwise a new one. The
            state is shared and moves in place; to "meta" it does not move.

        Raises:
            RuntimeError: If a weight that requires a gradient would be quantized.
            ValueError: If the dtype of the weight to quantize or a setting is not supported.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bnb_quantized:
            return self if device is None else self._moved(device, non_blocking)
        if device is not None and device.type != "meta":
            return self._quantized(device)
        moved = super().to(device=device, dtype=dtype, non_blocking=non_blocking)
        if moved is self:
            return self
        return type(self)(moved.detach(), self.requires_grad, **self._attributes())

    def cpu(self):
        """Returns ``self.to("cpu")``."""
        return self.to("cpu")

    def cuda(self, device=None, non_blocking=False):
        """Returns ``self.to(device)``, by default the current CUDA device."""
        return self.to(device_of("cuda", device), non_blocking=non_blocking)

    def xpu(self, device=None, non_blocking=False):
        """Returns ``self.to(device)``, by default the current XPU device."""
        return self.to(device_of("xpu", device), non_blocking=non_blocking)

    # Casts of a packed weight, which may be held in a floating-point dtype, leave its bytes alone.

    def half(self, *args, **kwargs):
        """Returns ``self.to(torch.float16)``: the parameter itself once it is packed."""
        return self.to(torch.float16)

    def bfloat16(self, *args, **kwargs):
        """Returns ``self.to(torch.bfloat16)``: the parameter itself once it is packed."""
        return self.to(torch.bfloat16)

    def float(self, *args, **kwargs):
        """Returns ``self.to(torch.float32)``: the parameter itself once it is packed."""
        return self.to(torch.float32)

    def double(self, *args, **kwargs):
        """Returns ``self.to(torch.float64)``: the parameter itself once it is packed."""
        return self.to(torch.float64)

    def type(self, dtype=None, *args, **kwargs):
        """Casts as :meth:`torch.Tensor.type` does, unless the weight is packed."""
        if dtype is not None and self.bnb_quantized:
            return self
        return super().type(dtype, *args, **kwargs)

    def _attributes(self) -> dict[str, Any]:
        """Returns what the instance holds, for the constructor."""
        return {key: value for key, value in self.__dict__.items() if key != "requires_grad"}

    def _quantized(self, device: torch.device) -> "Params4bit":
        if self.requires_grad:
            raise RuntimeError(
                "Params4bit.to: a weight with requires_grad=True cannot be packed into 4 bits; "
                "set requires_grad to False"
            )
        # Not as inference tensors, because training may come later.
        with torch.inference_mode(False), torch.no_grad():
            packed, state = quantize_4bit(
                self.data.to(device),
                blocksize=self.blocksize,
                compress_statistics=bool(self.compress_statistics),
                quant_type=self.quant_type,
                quant_storage=self.quant_storage,
            )
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state
        return self

    def _moved(self, device: torch.device, non_blocking: bool) -> "Params4bit":
        packed = self.data.to(device, non_blocking=non_blocking)
        state = self.quant_state
        # Values go nowhere without a copy of theirs: offloaded codes come back, to the same state.
        if state is not None and not packed.is_meta and not state.absmax.is_meta:
            state = move_state(state, packed.device)
        attributes = self._attributes() | {"quant_state": state, "module": None}
        return type(self)(packed, self.requires_grad, **attributes)

    # --- copying ----------------------------------------------------------------------------

    def __copy__(self):
        copied = type(self)(self.data, self.requires_grad)
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        copied = type(self)(copy.deepcopy(self.data, memo), self.requires_grad)
        memo[id(self)] = copied
        for key, value in self.__dict__.items():
            # A layer that is being copied has its copy in the memo; it is not copied from here.
            copied.__dict__[key] = (
                memo.get(id(value), value) if key == "module" else copy.deepcopy(value, memo)
            )
        return copied

    def __reduce_ex__(self, protocol):
        # The attributes come after the object: `module` leads back to this parameter.
        return type(self), (self.data, self.requires_grad), dict(self.__dict__)

    def __setstate__(self, state):
        self.__dict__.update(state)
