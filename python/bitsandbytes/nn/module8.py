# SPDX-License-Identifier: MIT
"""How layers with an int8 weight are moved, saved and loaded."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .._checks import check, check_numel
from ..autograd.matmul import MatmulLtState
from ..utils import (
    INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING as FORMAT_NAMES,
)
from ..utils import (
    LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING as FORMAT_NUMBERS,
)
from .params import Int8Params, without_parameter

__all__ = ["Module8bit"]


class Module8bit(nn.Module):
    """Base of layers whose parameter `weight` is an :class:`Int8Params`.

    A state dict holds the codes as ``weight``, their float32 statistics as ``SCB`` and
    ``weight_format``.
    """

    # Codes and statistics once a product has taken them over from the parameter.
    state: MatmulLtState

    def _shape(self) -> list[int]:
        """Returns the shape of the weight."""
        raise NotImplementedError

    def _stats(self) -> Tensor | None:
        """Returns the statistics of an int8 weight, wherever they are at the moment."""
        if self.weight.dtype != torch.int8:
            return None
        stats = getattr(self.weight, "SCB", None)
        return self.state.SCB if stats is None else stats

    # --- moving -----------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        weight = self._parameters.get("weight")
        if weight is None:
            return super()._apply(fn, recurse)
        # torch.nn.Module would lose the class, the codes or the statistics of the weight.
        with without_parameter(self, "weight"):
            super()._apply(fn, recurse)
        with torch.no_grad():
            self._apply_to_weight(fn, weight)
        return self

    def _apply_to_weight(self, fn, weight: nn.Parameter) -> None:
        quantized, was_meta = weight.dtype == torch.int8, weight.is_meta
        moved = fn(weight)
        if quantized and moved.dtype != torch.int8:
            moved = weight.to(moved.device)  # codes mean nothing in another dtype
        if moved is not weight:
            grad, weight.grad = weight.grad, None
            if torch._has_compatible_shallow_copy_type(weight, moved):
                weight.data = moved.data
            else:
                attributes = dict(weight.__dict__) if isinstance(weight, Int8Params) else {}
                weight = type(weight)(moved.data, weight.requires_grad, **attributes)
                self._parameters["weight"] = weight
            if grad is not None:
                weight.grad = fn(grad)

        def follow(stats: Tensor | None) -> Tensor | None:
            if stats is None or not stats.is_meta:
                return None if stats is None else stats.to(weight.device)
            # Module.to_empty gives memory to what had none.
            return torch.empty_like(stats, device=weight.device) if was_meta else stats

        if isinstance(weight, Int8Params):
            weight.SCB = follow(weight.SCB)
            if weight.CB is not None or weight.SCB is not None:
                weight.CB = weight.data
        if not quantized:
            self.state.reset_grads()  # they were derived from the weight, and will be again
        elif self.state.CB is not None:
            self.state.CB, self.state.SCB = weight.data, follow(self.state.SCB)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # Pickling separates what shared memory: the codes would be there twice.
        if self.weight.dtype == torch.int8 and self.state.CB is not None:
            self.state.CB = self.weight.data

    # --- state dict -------------------------------------------------------------------------

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stats = self._stats()
        if stats is not None:
            destination[prefix + "SCB"] = stats if keep_vars else stats.detach()
            row = torch.tensor(FORMAT_NUMBERS["row"], dtype=torch.uint8)
            destination[prefix + "weight_format"] = row

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
        value = state_dict.get(key)
        weight = self._parameters.get("weight")
        if not isinstance(value, Tensor) or weight is None:
            return super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )

        # A copy, because the dict is the caller's: without what torch.nn.Module does not know.
        known = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        _check_format(type(self).__name__, known.pop(prefix + "weight_format", "row"))
        stats = known.pop(prefix + "SCB", None) if value.dtype == torch.int8 else None
        assign = local_metadata.get("assign_to_params_buffers", False)
        ours = torch.int8 in (value.dtype, weight.dtype)
        if ours:
            del known[key]
        with without_parameter(self, "weight") if ours else nullcontext():
            super()._load_from_state_dict(
                known,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        if ours:
            problem = self._mismatch(value, stats, assign)
            if problem is None:
                with torch.no_grad():
                    self._load_weight(value, stats, assign)
            else:
                error_msgs.append(f"{key}: {problem}")
        elif assign and isinstance(weight, Int8Params):
            # torch.nn.Module makes a plain parameter of what is assigned.
            self.weight = Int8Params(
                self.weight.data, weight.requires_grad, weight.has_fp16_weights
            )

    def _mismatch(self, value: Tensor, stats: Tensor | None, assign: bool) -> str | None:
        """Says why a weight and its statistics cannot be loaded, or returns None if they can."""
        if value.dtype == torch.int8:
            ready = self._stats() is not None or assign
            if self.state.has_fp16_weights or not ready:
                return (
                    f"Loading a quantized checkpoint into non-quantized {type(self).__name__} is "
                    "not possible: create the layer with has_fp16_weights=False and move it to a "
                    "device first, as in layer.to(device)"
                )
            if not isinstance(stats, Tensor) or not stats.is_floating_point():
                return "an int8 weight needs floating-point statistics (SCB), which are missing"
            if stats.numel() != self._shape()[0]:
                return (
                    f"SCB must hold one statistic per row, {self._shape()[0]}, "
                    f"got shape {list(stats.shape)}"
                )
        elif not value.is_floating_point():
            return f"the weight must be floating point or int8, got {value.dtype}"
        shape = self._shape()
        if list(value.shape) != shape:
            return f"size mismatch: the weight must be of shape {shape}, got {list(value.shape)}"
        return None

    def _load_weight(self, value: Tensor, stats: Tensor | None, assign: bool) -> None:
        """Takes a checked weight; a floating-point one is quantized."""
        if assign:
            codes = value if value.dtype == torch.int8 else None
            stats = None if stats is None else stats.float().flatten()
            self.weight = Int8Params(value.detach(), False, False, codes, stats)
            self.state.reset_grads()
            return
        weight = self.weight
        if value.dtype != torch.int8:
            new = Int8Params(value.detach(), requires_grad=False)._quantized(value.device)
            value, stats = new.data, new.SCB
        weight.copy_(value)
        for holder in (weight, self.state):
            if getattr(holder, "CB", None) is not None:
                holder.CB = weight.data
        own = self._stats()
        if own is None:
            self.state.CB, self.state.SCB = weight.data, stats
        else:
            own.copy_(stats.flatten())


def _check_format(layer: str, value: Tensor | int | str) -> None:
    """Raises ValueError unless a checkpoint's layout, a name or a number, is the one in use."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return
        check_numel(layer, "weight_format", value, 1, "a format")
        value = int(value.item())
    name = FORMAT_NAMES.get(value, value) if isinstance(value, int) else value
    check(name == "row", layer, "weight_format", "row", name)
