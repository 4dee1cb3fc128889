# SPDX-License-Identifier: MIT
"""Columns of activations and weights that hold outliers: how to find them, and a record of them."""

import logging
from typing import ClassVar, Optional

import torch
from torch import Tensor, nn

__all__ = ["OutlierTracer", "find_outlier_dims", "outlier_hook"]

logger = logging.getLogger("bitsandbytes.utils")

# What marks a column of activations, for the first layer of a model.
ACTIVATION_ZSCORE = 3.0
ACTIVATION_THRESHOLD = 6.0


def find_outlier_dims(
    weight: Tensor,
    reduction_dim: int = 0,
    zscore: float = 4.0,
    topk: int | None = None,
    rdm: bool = False,
) -> Tensor:
    """Finds the columns whose standard deviation stands out.

    Args:
        weight: Floating-point matrix.
        reduction_dim: Dimension over which deviations are taken; the other one is searched.
        zscore: Deviations of the deviations from which a column stands out.
        topk: Number of columns to return instead: those that vary most, or as many random ones.
        rdm: Whether to return `topk` random columns.

    Returns:
        int64 columns.

    Example:
        >>> weight = torch.ones(4, 100)
        >>> weight[0, 7] = 50
        >>> find_outlier_dims(weight)
        tensor([7])
    """
    if rdm:
        return torch.randint(0, weight.shape[1], (topk or 0,), device=weight.device)
    deviation = weight.std(reduction_dim)
    if topk is not None:
        return torch.topk(deviation, k=topk, dim=0).indices
    scores = (deviation - deviation.mean()) / deviation.std()
    return torch.nonzero(scores > zscore).flatten()


class OutlierTracer:
    """Learns the outlier columns of every linear layer of a model in its first forward."""

    _instance: ClassVar[Optional["OutlierTracer"]] = None

    hvalues: list[int]
    outliers: list[Tensor]
    hvalue2outlier_idx: dict[int, Tensor]
    hooks: list

    def __init__(self) -> None:
        raise RuntimeError("OutlierTracer is one object: use get_instance()")

    @classmethod
    def get_instance(cls) -> "OutlierTracer":
        """Returns the one tracer of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._clear()
        return cls._instance

    _initialized = False

    def _clear(self) -> None:
        self.hvalues, self.outliers, self.hvalue2outlier_idx, self.hooks = [], [], {}, []

    def initialize(self, model: nn.Module) -> None:
        """Begins to trace the linear layers of `model`; forgets what was traced before."""
        for hook in getattr(self, "hooks", []):
            hook.remove()
        self._clear()
        self._initialized = True
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self.hooks.append(module.register_forward_pre_hook(outlier_hook))

    def is_initialized(self) -> bool:
        """Returns whether a model is or was traced."""
        return self._initialized

    def get_hvalue(self, weight: Tensor) -> int:
        """Returns what a weight is known by: the address of its memory."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """Returns the outlier columns of the layer with this weight, None without a record."""
        if not self.is_initialized():
            logger.warning(
                "OutlierTracer: no model is traced: call OutlierTracer.get_instance().initialize(m)"
            )
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))

    def _record(self, weight: Tensor, columns: Tensor) -> None:
        hvalue = self.get_hvalue(weight)
        self.hvalues.append(hvalue)
        self.outliers.append(columns)
        self.hvalue2outlier_idx[hvalue] = columns


def outlier_hook(module: nn.Module, input: tuple[Tensor, ...]) -> None:
    """Records the outlier columns of a layer, once; hooks go when a layer is met a second time.

    The first layer that runs is judged by its input, whose outliers others pass on; later ones by
    their weights.
    """
    tracer = OutlierTracer.get_instance()
    if tracer.get_hvalue(module.weight) in tracer.hvalue2outlier_idx:
        for hook in tracer.hooks:
            hook.remove()
        tracer.hooks = []
        return
    if tracer.hvalues:
        columns = find_outlier_dims(module.weight.detach(), reduction_dim=0)
    else:
        rows = input[0].detach().reshape(-1, input[0].shape[-1])
        varied = find_outlier_dims(rows, reduction_dim=0, zscore=ACTIVATION_ZSCORE)
        large = torch.nonzero((rows.abs() > ACTIVATION_THRESHOLD).any(0)).flatten()
        columns = torch.cat([varied, large]).unique()
    tracer._record(module.weight, columns)
