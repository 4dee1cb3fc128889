# SPDX-License-Identifier: MIT
"""Linear layers whose products are rounded to FP8, simulated."""

from torch import Tensor, nn

from ...quant.codes import create_fp8_map
from ..fp8 import block_size_of, matmul_fp8_global, matmul_fp8_mixed

__all__ = ["LinearFP8Global", "LinearFP8Mixed"]


class LinearFP8Mixed(nn.Linear):
    """Linear layer with operands rounded to FP8: activations by blocks, the weight with one scale.

    Source: Wortsman et al. 2023, https://arxiv.org/abs/2304.13013. See
    :func:`bitsandbytes.research.matmul_fp8_mixed`.

    Args:
        input_features: Length of an input vector.
        output_features: Length of an output vector.
        bias: Whether the layer has a bias.

    Example:
        >>> bnb.research.nn.LinearFP8Mixed(64, 32)(torch.ones(2, 64)).shape
        torch.Size([2, 32])
    """

    _matmul = staticmethod(matmul_fp8_mixed)

    def __init__(self, input_features: int, output_features: int, bias: bool = True):
        super().__init__(input_features, output_features, bias)
        self.bsz = block_size_of(input_features)
        self.bsz2 = block_size_of(output_features)
        self.fw_code: Tensor | None = None
        self.bw_code: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product of `x` ``[..., input_features]``."""
        if self.fw_code is None or self.fw_code.device != x.device:
            self.fw_code = create_fp8_map(True, 4, 3, 8).to(x.device)
            self.bw_code = create_fp8_map(True, 5, 2, 8).to(x.device)
        out = self._matmul(
            x, self.weight.t(), self.fw_code, self.bw_code, bsz=self.bsz, bsz2=self.bsz2
        )
        return out if self.bias is None else out + self.bias


class LinearFP8Global(LinearFP8Mixed):
    """Linear layer with operands rounded to FP8, each with one scale.

    Its arguments are those of :class:`LinearFP8Mixed`.
    """

    _matmul = staticmethod(matmul_fp8_global)
