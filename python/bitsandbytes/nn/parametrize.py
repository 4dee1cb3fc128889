# SPDX-License-Identifier: MIT
"""4-bit parameters of any module, dequantized when they are read: expert weights, for example.

The parameter becomes a parametrization of `torch.nn.utils.parametrize`. Reading it gives a tensor
of its old shape and dtype; during a forward pass of its module it is dequantized once.
"""

from typing import Any

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from ..quant.four_bit import dequantize_4bit, quantize_4bit
from ..quant.state import QuantState
from .state4 import copied, copy_state, is_state_entry, move_state, read_state, target_of

__all__ = [
    "Bnb4bitParametrization",
    "replace_parameter_4bit",
    "replace_parameter_4bit_prequantized",
]


class Bnb4bitParametrization(nn.Module):
    """Turns packed 4-bit codes into numbers.

    Args:
        quant_state: State of the codes.
    """

    def __init__(self, quant_state: QuantState):
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """Returns what the codes stand for, in the shape and dtype of the state."""
        return dequantize_4bit(quantized_param, self.quant_state)

    def _apply(self, fn, recurse=True):
        state = self.quant_state
        self.quant_state = move_state(state, target_of(fn, state.absmax.device))
        return super()._apply(fn, recurse)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantizes a parameter of a module to 4 bits, in place and where it is.

    ``module.state_dict()`` then has the packed codes under the name of the parameter and their
    state beside them, as the 4-bit layers do, and ``load_state_dict`` takes that as well as a
    floating-point checkpoint.

    Args:
        module: Any module.
        param_name: Name of a parameter of its own, of any shape; float32, float16 or bfloat16.
        compress_statistics: Quantize the scales as well.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: Elements that share a scale. Default: 64.

    Raises:
        AttributeError: The module has no such attribute.
        TypeError: The attribute is not a parameter.
        ValueError: The dtype of the parameter or a setting is not supported.

    Example:
        >>> import torch
        >>> from bitsandbytes.nn.parametrize import replace_parameter_4bit
        >>> experts = torch.nn.Module()
        >>> experts.weight = torch.nn.Parameter(torch.randn(4, 32, 16))
        >>> replace_parameter_4bit(experts, "weight")
        >>> experts.weight.shape, experts.parametrizations.weight.original.shape
        (torch.Size([4, 32, 16]), torch.Size([1024, 1]))
    """
    original = _parameter(module, param_name)
    packed, state = quantize_4bit(
        original.data,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    _parametrize(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device | str
) -> None:
    """Makes a parameter that holds packed codes already read as the numbers they stand for.

    Args:
        module: Any module.
        param_name: Name of a parameter of its own, packed codes.
        qs_dict: Entries of their state, as :meth:`QuantState.as_dict` gives them.
        device: Where the state goes.

    Raises:
        AttributeError: The module has no such attribute.
        TypeError: The attribute is not a parameter.
        ValueError, AssertionError: The entries are not those of a state.
    """
    original = _parameter(module, param_name)
    _parametrize(module, param_name, original.data, read_state(qs_dict, device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    param = getattr(module, name)
    if not isinstance(param, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return param


def _parametrize(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    # Unsafe: shape and dtype of what is read are not those of what is held.
    P.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, name)


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Gives the module its state dict and the cache of one forward pass, once."""
    if _enable_parametrization_cache in module._forward_pre_hooks.values():
        return
    module.register_state_dict_post_hook(_save)
    module.register_load_state_dict_pre_hook(_load)
    module.register_forward_pre_hook(_enable_parametrization_cache)
    # Also after an error, such as the one that ends a recomputation of torch.utils.checkpoint.
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


def _enable_parametrization_cache(module, inputs) -> None:
    P._cache_enabled += 1


def _disable_parametrization_cache(module, inputs, output) -> None:
    P._cache_enabled = max(P._cache_enabled - 1, 0)
    if P._cache_enabled == 0:
        P._cache.clear()


# --- state dict -----------------------------------------------------------------------------------


def _of(module: nn.Module) -> dict[str, tuple[str, Bnb4bitParametrization]]:
    """Returns the name of the codes in a state dict, and the parametrization, by parameter."""
    return {
        name: (f"parametrizations.{name}.original", steps[0])
        for name, steps in getattr(module, "parametrizations", {}).items()
        if isinstance(steps[0], Bnb4bitParametrization)
    }


def _save(module, state_dict, prefix, local_metadata) -> None:
    for name, (original, parametrization) in _of(module).items():
        packed = state_dict.pop(prefix + original, None)
        if packed is None:
            continue
        state_dict[prefix + name] = packed
        for key, value in parametrization.quant_state.as_dict(packed=True).items():
            state_dict[f"{prefix}{name}.{key}"] = value.detach()


def _load(
    module,
    state_dict,
    prefix,
    local_metadata,
    strict,
    missing_keys,
    unexpected_keys,
    error_msgs,
) -> None:
    for name, (original, parametrization) in _of(module).items():
        key = prefix + name
        keys = [k for k in state_dict if is_state_entry(k, key)]
        entries = {k[len(key) + 1 :]: state_dict.pop(k) for k in keys}
        value = state_dict.pop(key, None)
        if value is None:
            continue
        state = parametrization.quant_state
        device = value.device if state.absmax.is_meta else state.absmax.device
        try:
            if entries:
                packed, loaded = value, read_state(copied(entries), device)
            else:
                packed, loaded = _quantized(value.to(device), state)
            if loaded.shape != state.shape:
                raise ValueError(
                    f"size mismatch: the parameter must be of shape {list(state.shape)}, "
                    f"got {list(loaded.shape)}"
                )
        except (AssertionError, KeyError, ValueError) as error:
            error_msgs.append(f"{key}: {error}")
            continue
        with torch.no_grad():
            copy_state(state, loaded)
        state_dict[prefix + original] = packed


def _quantized(value: Tensor, state: QuantState) -> tuple[Tensor, QuantState]:
    return quantize_4bit(
        value.to(state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
    )
