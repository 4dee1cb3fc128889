# SPDX-License-Identifier: MIT
"""Small public helpers: JSON carried in a tensor, formats of int8 weights."""

import json
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "pack_dict_to_tensor",
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
