# SPDX-License-Identifier: MIT
"""A base for linear layers that treat the outlier columns of their input apart."""

import torch
from torch import Tensor, nn

from ..outliers import OutlierTracer

__all__ = ["OutlierAwareLinear"]


class OutlierAwareLinear(nn.Linear):
    """Linear layer that learns its outlier columns in the first forward.

    They are those that the :class:`~bitsandbytes.utils.OutlierTracer` has found. A subclass says
    what to do with them: `quantize_weight` is called once, with the weight, `forward_with_outliers`
    in every forward.

    Args:
        input_features: Length of an input vector.
        output_features: Length of an output vector.
        bias: Whether the layer has a bias.
        device: Where the parameters are created.

    Example:
        >>> class Rounded(OutlierAwareLinear):
        ...     def quantize_weight(self, w, outlier_idx):
        ...         return w.round()
        ...     def forward_with_outliers(self, x, outlier_idx):
        ...         return torch.nn.functional.linear(x, self.weight, self.bias)
        >>> model = torch.nn.Sequential(Rounded(4, 4))
        >>> bnb.utils.OutlierTracer.get_instance().initialize(model)
        >>> model(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """Returns the output; a subclass says how."""
        raise NotImplementedError(
            f"{type(self).__name__}: a subclass of OutlierAwareLinear defines forward_with_outliers"
        )

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """Returns what takes the place of the weight `w`; a subclass says how."""
        raise NotImplementedError(
            f"{type(self).__name__}: a subclass of OutlierAwareLinear defines quantize_weight"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns what `forward_with_outliers` does, after the weight was quantized once."""
        if self.outlier_dim is None:
            self.outlier_dim = OutlierTracer.get_instance().get_outliers(self.weight)
        if not self.is_quantized:
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
