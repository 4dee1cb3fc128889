# SPDX-License-Identifier: MIT
"""Experts of a mixture whose weights are 4-bit parameters ``[experts, out, in]``.

A token is sent to a few experts (Shazeer et al. 2017, arXiv:1701.06538). Rows are sorted by expert,
so that the codes of each weight are read once for all of its tokens.
"""

import sys

import torch
from torch import Tensor, nn

from .._checks import check
from ..autograd.grouped4 import grouped_matmul_4bit
from .parametrize import Bnb4bitParametrization, replace_parameter_4bit

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "experts_forward_4bit",
    "group_by_expert",
    "grouped_linear_4bit",
    "replace_experts_4bit",
]

# What experts modules of transformers call their weights.
EXPERT_NAMES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
# Of :func:`experts_forward_4bit` in transformers.
EXPERTS_IMPLEMENTATION = "bitsandbytes_4bit"


def group_by_expert(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts rows by expert, on the device.

    Args:
        expert: Integer ``[rows]``, the expert of each row. Numbers from `num_experts` on, which
            expert parallelism uses for experts of other devices, are of none.
        num_experts: Number of experts.

    Returns:
        The rows in the order of their experts, int64 ``[rows]``; and where the rows of each expert
        end in it, int64 ``[num_experts]``.

    Example:
        >>> order, offs = group_by_expert(torch.tensor([2, 0, 2]), 3)
        >>> order.tolist(), offs.tolist()
        ([1, 0, 2], [1, 1, 3])
    """
    sorted_experts, order = torch.sort(expert, stable=True)
    numbers = torch.arange(num_experts, device=expert.device, dtype=expert.dtype)
    return order, torch.searchsorted(sorted_experts, numbers, right=True)


def grouped_linear_4bit(
    module: nn.Module,
    param_name: str,
    x: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Multiplies rows, sorted by expert, with the 4-bit weights of their experts.

    Reading the parameter would dequantize the weights of all experts; this reads packed codes.

    Args:
        module: Module that holds the weights.
        param_name: Name of its parameter ``[experts, out, in]``, after :func:`replace_experts_4bit`
            or :func:`~bitsandbytes.nn.parametrize.replace_parameter_4bit`.
        x: ``[rows, in]``; float32, float16 or bfloat16.
        offs: int32 or int64 ``[experts]``: where the rows of each expert end.
        bias: ``[experts, out]``.
        transposed: The parameter is ``[experts, in, out]``.

    Returns:
        ``[rows, out]`` in the dtype of `x`, as :func:`bitsandbytes.grouped_matmul_4bit` gives it.

    Raises:
        ValueError: The module has no 4-bit parameter of this name, or an argument does not fit it.

    Example:
        An experts module of one's own:

        >>> import torch
        >>> import bitsandbytes as bnb
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up_proj = torch.nn.Parameter(torch.randn(8, 64, 32))
        ...         self.down_proj = torch.nn.Parameter(torch.randn(8, 32, 64))
        ...
        ...     def forward(self, x, expert):  # [tokens, 32] and [tokens]
        ...         order, offs = bnb.nn.group_by_expert(expert, 8)
        ...         hidden = bnb.nn.grouped_linear_4bit(self, "up_proj", x[order], offs)
        ...         out = bnb.nn.grouped_linear_4bit(self, "down_proj", hidden.relu(), offs)
        ...         return torch.empty_like(x).index_copy(0, order, out)
        >>> experts = Experts()
        >>> bnb.nn.replace_experts_4bit(experts)
        ['up_proj', 'down_proj']
        >>> experts(torch.randn(5, 32), torch.tensor([0, 7, 3, 0, 1])).shape
        torch.Size([5, 32])
    """
    if not _is_packed(module, param_name):
        name, kind = "grouped_linear_4bit", type(module).__name__
        check(False, name, "param_name", f"a 4-bit parameter of {kind}", repr(param_name))
    weight = module.parametrizations[param_name]
    state = weight[0].quant_state
    return grouped_matmul_4bit(x, weight.original, offs, state, bias, transposed=transposed)


def replace_experts_4bit(
    model: nn.Module,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
    *,
    param_names: tuple[str, ...] = EXPERT_NAMES,
) -> list[str]:
    """Quantizes the experts of a model to 4 bits, in place and where they are.

    Every parameter of three dimensions with one of the names is replaced as
    :func:`~bitsandbytes.nn.parametrize.replace_parameter_4bit` does it, with the same state dict.
    Models of transformers whose experts can be exchanged (``set_experts_implementation``) use
    :func:`experts_forward_4bit` from then on. Other modules find the numbers under the
    name of the parameter as before, dequantized once in a forward pass, unless their ``forward``
    calls :func:`grouped_linear_4bit`.

    Args:
        model: Any module: a model, or its experts.
        compress_statistics: Quantize the scales as well.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: Elements that share a scale. Default: 64.
        param_names: Names of parameters that hold the weights of experts.

    Returns:
        The names of the parameters that were replaced, as in ``model.named_parameters()``.

    Raises:
        ValueError: There is no such parameter, its dtype is not float32, float16 or bfloat16, or a
            setting is not supported.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> experts = torch.nn.Module()
        >>> experts.down_proj = torch.nn.Parameter(torch.randn(4, 32, 16))
        >>> bnb.nn.replace_experts_4bit(experts, quant_type="fp4")
        ['down_proj']
    """
    found = [
        (module, name, f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules()
        for name, param in module.named_parameters(recurse=False)
        if name in param_names and param.dim() == 3
    ]
    if not found:
        expected = f"a module with parameters of three dimensions named {' or '.join(param_names)}"
        check(False, "replace_experts_4bit", "model", expected, type(model).__name__)
    for module, name, _ in found:
        replace_parameter_4bit(module, name, compress_statistics, quant_type, blocksize)
    _use_in_transformers([module for module, _, _ in found])
    return [name for _, _, name in found]


def _is_packed(module: nn.Module, param_name: str) -> bool:
    steps = getattr(module, "parametrizations", {})
    return param_name in steps and isinstance(steps[param_name][0], Bnb4bitParametrization)


# --- transformers ---------------------------------------------------------------------------------


def experts_forward_4bit(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward pass of an experts module of transformers, from packed 4-bit weights.

    It is registered with transformers as ``"bitsandbytes_4bit"``, so that
    ``model.set_experts_implementation`` takes this name. Modules whose weights are not packed are
    computed by transformers' ``"grouped_mm"``.

    Args:
        module: Experts as ``use_experts_implementation`` of transformers decorates them: weights
            ``gate_up_proj`` or ``up_proj``, and ``down_proj``.
        hidden_states: ``[tokens, hidden]``; float32, float16 or bfloat16.
        top_k_index: Integer ``[tokens, k]``, the experts of each token.
        top_k_weights: ``[tokens, k]``, the share of each.

    Returns:
        ``[tokens, hidden]`` in the dtype of `hidden_states`.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if not (_is_packed(module, first) and _is_packed(module, "down_proj")):
        functions = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
        return functions["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)
    tokens, top_k = top_k_index.shape
    order, offs = group_by_expert(top_k_index.reshape(-1), module.num_experts)

    def linear(name: str, x: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return grouped_linear_4bit(module, name, x, offs, bias, transposed=module.is_transposed)

    hidden = linear(first, hidden_states[order // top_k])
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out = linear("down_proj", hidden)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    out = torch.empty_like(out).index_copy(0, order, out)
    return out.view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _use_in_transformers(modules: list[nn.Module]) -> None:
    """Lets experts modules of transformers compute by :func:`experts_forward_4bit`."""
    integration = sys.modules.get("transformers.integrations.moe")
    if integration is None or not hasattr(integration, "ALL_EXPERTS_FUNCTIONS"):
        return
    integration.ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward_4bit)
    for module in modules:
        # What the decorator of exchangeable experts leaves on them.
        if hasattr(module, "is_transposed") and hasattr(module, "_is_expert_parallel"):
            module.config._experts_implementation = EXPERTS_IMPLEMENTATION
