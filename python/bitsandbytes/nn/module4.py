# SPDX-License-Identifier: MIT
"""How layers with a packed 4-bit weight are moved, saved and loaded."""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.four_bit import get_4bit_type
from ..quant.state import QuantState
from .params import own_tensor, without_parameter
from .params4 import Params4bit
from .state4 import (
    are_codes_of,
    copied,
    copy_state,
    is_state_entry,
    move_state,
    read_state,
    stored_as,
    target_of,
)

__all__ = ["Module4bit"]

# The name that programs configure and tests listen to.
logger = logging.getLogger("bitsandbytes.nn.modules")


class Module4bit(nn.Module):
    """Base of layers whose parameter `weight` is a :class:`Params4bit`.

    A state dict holds the packed codes as ``weight`` and, behind the other parameters, their state:
    ``weight.absmax``, ``weight.quant_map``, with double quantization ``weight.nested_absmax`` and
    ``weight.nested_quant_map``, and the rest as JSON in ``weight.quant_state.bitsandbytes__nf4`` or
    ``...fp4``. It loads into a layer of that shape, quantized or not; a floating-point checkpoint
    does too, and is quantized where the layer is.
    """

    # The state of the weight; the only one left when other code has replaced the parameter.
    quant_state: QuantState | None
    quant_storage: torch.dtype

    def _shape(self) -> list[int]:
        """Returns the shape of the weight before it was packed."""
        raise NotImplementedError

    def _packed_weight(self, device: torch.device) -> tuple[Tensor, QuantState]:
        """Returns the packed codes and their state, wherever the latter is left.

        Args:
            device: Where the input is, which the state follows if the codes are there.

        Raises:
            RuntimeError: The weight is not packed, or its state is lost.
        """
        weight = own_tensor(self, "weight")
        state = getattr(weight, "quant_state", None)
        if state is None:
            state = self.quant_state
            storage = self.quant_storage
            if state and weight.dtype != storage and are_codes_of(state, weight, storage):
                raise RuntimeError(
                    f"{type(self).__name__}: the packed weight must be {storage}, got "
                    f"{weight.dtype}: mixed precision has cast its bytes; with quant_storage="
                    f"{weight.dtype} it leaves them alone"
                )
            if state is None or not are_codes_of(state, weight):
                raise self._missing_state()
            if not torch.compiler.is_compiling():
                weight = self._restored(weight, state)
        elif state is not self.quant_state:
            self.quant_state = state
        if state.absmax.device != device and weight.device == device:
            state.to(device)  # FSDP may move the weight to the host and back
        return weight, state

    def _restored(self, weight: Tensor, state: QuantState) -> Tensor:
        """Gives the parameter back the class and the state that FSDP, for one, drops."""
        if not isinstance(weight, nn.Parameter) or type(weight) not in (nn.Parameter, Params4bit):
            return weight
        if not isinstance(weight, Params4bit):
            weight = Params4bit(weight.data, weight.requires_grad, module=self)
            weight.quant_storage = self.quant_storage
            self.weight = weight
        weight._hold(state)
        return weight

    def _missing_state(self) -> RuntimeError:
        """Logs and returns that the weight cannot be used yet."""
        name = type(self).__name__
        logger.warning(
            "%s: quantization state not initialized: move the layer to a device first, as in "
            "layer.to(device)",
            name,
        )
        return RuntimeError(
            f"{name}: quantization state not initialized: the weight of shape "
            f"{list(self.weight.shape)} is not quantized or has lost its state; move the layer to "
            "a device, as in layer.to(device), or load a quantized checkpoint"
        )

    def __setstate__(self, state: dict) -> None:
        """Reads pickled layers of every release: their weights come as plain parameters."""
        super().__setstate__(state)
        weight = self._parameters.get("weight")
        self.__dict__.setdefault("quant_state", None)
        self.__dict__.setdefault("quant_storage", None if weight is None else weight.dtype)
        found = getattr(weight, "quant_state", None)
        if found is not None and not isinstance(weight, Params4bit):
            if isinstance(found, (list, tuple)):
                found = QuantState.from_list(found)
                found.code = get_4bit_type(found.quant_type, weight.device)
            self._restored(weight, found)

    # --- moving -----------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        weight, state = self._parameters.get("weight"), self.quant_state
        if not isinstance(weight, Params4bit):
            if weight is None or state is None or not are_codes_of(state, weight):
                return super()._apply(fn, recurse)
            self.quant_state = move_state(state, target_of(fn, weight.device))
            return super()._apply(lambda t: _moved(fn, t) if t is weight else fn(t), recurse)
        # torch.nn.Module would lose the class or the state of the weight.
        with without_parameter(self, "weight"):
            super()._apply(fn, recurse)
        with torch.no_grad():
            self._parameters["weight"] = weight = _applied(fn, weight)
        if weight.quant_state is not None:
            self.quant_state = weight.quant_state
        return self

    # --- state dict -------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        state = getattr(weight, "quant_state", None) or self.quant_state
        if weight is None or state is None or not are_codes_of(state, weight):
            return
        entries = state.as_dict(packed=True)
        for key, value in entries.items():
            destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()
        if not isinstance(weight, Params4bit):
            # torch.distributed.checkpoint looks up every key as attributes of the module.
            weight.quant_state = state
            for key in entries:
                if "." not in key:
                    setattr(weight, key, entries[key])

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ) -> None:
        key = prefix + "weight"
        value, weight = state_dict.get(key), self._parameters.get("weight")
        # A copy, because the dict is the caller's: without what torch.nn.Module does not know.
        known = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        entries = {k[len(key) + 1 :]: known.pop(k) for k in list(known) if is_state_entry(k, key)}
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)

        if entries and type(weight) is nn.Parameter:
            # As FSDP or a user may have left it.
            weight = Params4bit(weight.data, quant_storage=self.quant_storage, module=self)
            self._parameters["weight"] = weight
        quantized = bool(entries) or getattr(weight, "bnb_quantized", False)
        if not isinstance(value, Tensor) or not isinstance(weight, Params4bit) or not quantized:
            super()._load_from_state_dict(known, prefix, *rest)
            if isinstance(weight, Params4bit):
                self._keep_class(weight)
            if entries and isinstance(value, Tensor):
                self._load_state(key, entries, error_msgs)
            elif entries:
                error_msgs.append(f"{key}: the state of a 4-bit weight is there without its codes")
            return

        del known[key]
        with without_parameter(self, "weight"):
            super()._load_from_state_dict(known, prefix, *rest)
        if weight.is_meta and not assign:
            warnings.warn(
                f"{key}: loading into a layer on the meta device does nothing; use assign=True, or "
                "to_empty(device=...) before loading",
                stacklevel=2,
            )
            return
        with torch.no_grad():
            try:
                self._load_weight(value, entries, assign)
            except (AssertionError, KeyError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")

    def _keep_class(self, weight: Params4bit) -> None:
        """Undoes that torch.nn.Module makes a plain parameter of what is assigned."""
        loaded = self._parameters["weight"]
        if not isinstance(loaded, Params4bit):
            self._parameters["weight"] = type(weight)(
                loaded.data, weight.requires_grad, **weight._attributes()
            )

    def _load_state(self, key: str, entries: dict[str, Any], error_msgs: list[str]) -> None:
        """Takes the state of codes that torch.nn.Module has loaded, into a sharded weight."""
        weight = self._parameters["weight"]
        device = weight.device if self.quant_state is None else self.quant_state.absmax.device
        try:
            state = self._checked(read_state(copied(entries), device))
        except (AssertionError, KeyError, ValueError) as error:
            error_msgs.append(f"{key}: {error}")
            return
        if self.quant_state is None:
            self.quant_state = state
        else:
            with torch.no_grad():
                copy_state(self.quant_state, state)

    def _checked(self, state: QuantState) -> QuantState:
        """Returns `state` if it is that of a weight of this layer; raises ValueError if not."""
        if list(state.shape) != self._shape():
            raise ValueError(
                f"size mismatch: the weight must be of shape {self._shape()}, "
                f"got the state of one of shape {list(state.shape)}"
            )
        return state

    def _load_weight(self, value: Tensor, entries: dict[str, Any], assign: bool) -> None:
        """Takes packed codes with the entries of their state, or a weight to be quantized."""
        weight = self.weight
        device = value.device if assign else weight.device
        if entries:
            state = self._checked(read_state(entries if assign else copied(entries), device))
            packed = value
            if not are_codes_of(state, packed):
                raise ValueError(
                    f"size mismatch: a weight of shape {self._shape()} takes "
                    f"{(state.shape.numel() + 1) // 2} bytes as [elements, 1], got {packed.dtype} "
                    f"of shape {list(packed.shape)}"
                )
        else:
            if not value.is_floating_point() or list(value.shape) != self._shape():
                raise ValueError(
                    f"the weight must be floating point of shape {self._shape()}, or packed codes "
                    f"with their state, got {value.dtype} of shape {list(value.shape)} alone"
                )
            source = type(weight)(value.detach(), **(weight._attributes() | {"module": None}))
            source.bnb_quantized = False
            if not assign and weight.quant_state is not None:
                source.data = source.data.to(weight.quant_state.dtype)
            source._quantized(device)
            packed, state = source.data, source.quant_state
        if assign:
            self.quant_storage = packed.dtype
            self.weight = Params4bit(packed.detach(), quant_storage=packed.dtype, module=self)
            self.weight._hold(state)
            return
        packed = stored_as(packed, weight.quant_storage)
        if weight.shape == packed.shape and weight.dtype == packed.dtype:
            weight.copy_(packed)
        else:
            weight.data = packed.to(device, copy=True)
        if weight.quant_state is not None:
            # In place, for everybody who shares it.
            copy_state(weight.quant_state, state)
            state = weight.quant_state
        weight._hold(state)
        self.quant_state = state


def _moved(fn, packed: Tensor) -> Tensor:
    """Returns ``fn(packed)``, or only moves where that would cast what are bytes."""
    moved = fn(packed)
    return moved if moved.dtype == packed.dtype else packed.to(moved.device)


def _applied(fn, weight: Params4bit) -> Params4bit:
    """Returns `weight` after `fn`, the same object wherever its memory can be exchanged."""
    quantized, was_meta = weight.bnb_quantized, weight.is_meta
    moved = _moved(fn, weight) if quantized else fn(weight)
    if moved is weight:
        return weight
    state = moved.quant_state if isinstance(moved, Params4bit) else weight.quant_state
    if torch._has_compatible_shallow_copy_type(weight, moved):
        weight.data = moved.data
    else:
        weight = type(weight)(moved.data, weight.requires_grad, **weight._attributes())
    if quantized and state is not None and (was_meta or not state.absmax.is_meta):
        state = move_state(state, weight.device)
    weight.quant_state = state
    return weight
