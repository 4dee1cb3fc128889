# SPDX-License-Identifier: MIT
"""Small public helpers: JSON carried in a tensor, formats of int8 weights, replacing layers."""

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .outliers import OutlierTracer, find_outlier_dims, outlier_hook

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "execute_and_return",
    "find_outlier_dims",
    "outlier_hook",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    value: key for key, value in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """Writes a dictionary as JSON into a tensor, so that a state dict holds only tensors.

    Args:
        source_dict: Anything that `json.dumps` takes.

    Returns:
        uint8 tensor with the UTF-8 text.
    """
    return torch.tensor(list(json.dumps(source_dict).encode("utf-8")), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """Reads what :func:`pack_dict_to_tensor` wrote; the tensor may be on any device."""
    return json.loads(bytes(tensor_data.cpu().tolist()).decode("utf-8"))


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Replaces the linear layers of a model by layers of another class.

    Args:
        model: Model whose children, at any depth, are replaced in place.
        linear_replacement: Called with the sizes of a layer and whether it has a bias.
        skip_modules: Names of layers that stay: the name in their parent.
        copy_weights: Whether a new layer gets the parameters of the old one, themselves.
        post_processing_function: Name of a method of the old layer that is called with that layer
            afterwards.

    Returns:
        `model`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> type(replace_linear(model, bnb.nn.Linear8bitLt)[0]).__name__
        'Linear8bitLt'
    """
    for name, module in model.named_children():
        replace_linear(
            module, linear_replacement, skip_modules, copy_weights, post_processing_function
        )
        if not isinstance(module, nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        if copy_weights:
            new.weight, new.bias = module.weight, module.bias
        setattr(model, name, new)
        if post_processing_function is not None:
            getattr(module, post_processing_function)(module)
    return model


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Runs a command, without a shell, and returns what it wrote to its output and error streams.

    Example:
        >>> execute_and_return("echo one two")
        ('one two', '')
    """
    process = subprocess.run(shlex.split(command_string), capture_output=True, text=True)
    return process.stdout.strip(), process.stderr.strip()


def sync_gpu(t: Tensor) -> None:
    """Waits for the CUDA or XPU device of a tensor; does nothing for others."""
    if t.device.type in ("cuda", "xpu"):
        getattr(torch, t.device.type).synchronize(t.device)
