# SPDX-License-Identifier: MIT
"""An embedding with an int8 table, of which only the looked-up rows are dequantized."""

import torch
from torch import Tensor, nn

from ..autograd.matmul import MatmulLtState, dequantized
from .embedding import row_numbers
from .module8 import Module8bit
from .params import Int8Params

__all__ = ["Embedding8bit"]


class Embedding8bit(Module8bit, nn.Embedding):
    """Embedding whose table is int8 and frozen, with one scale for every row.

    The table is quantized when the layer is moved to a device, also to the CPU. It is saved and
    loaded like :class:`Linear8bitLt`; the state dict of one that is not quantized yet is refused,
    so that nobody saves a table they believe to be int8.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Length of a row.
        device: Where the table is created.
        dtype: dtype of the table before it is quantized, and of the result.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> layer = bnb.nn.Embedding8bit(100, 64).to("cpu")
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=False, has_fp16_weights=False)
        self.state = MatmulLtState()
        self.state.has_fp16_weights = False

    def _shape(self) -> list[int]:
        return [self.num_embeddings, self.embedding_dim]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self._stats() is None:
            raise NotImplementedError(
                "Embedding8bit: an embedding that is not quantized has no state dict; move it to a "
                "device first, as in layer.to(device)"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the rows `input` (integers of any shape), ``[..., embedding_dim]``."""
        stats = self._stats()
        if stats is None:
            raise RuntimeError(
                f"Embedding8bit: the table is not quantized, its dtype is {self.weight.dtype}; "
                "move the layer to a device first, as in layer.to(device)"
            )
        if self.state.SCB is not stats:
            # Where torch.export finds them: it puts a plain parameter in the place of the weight.
            self.state.CB, self.state.SCB = self.weight.data, stats
        rows = row_numbers(type(self).__name__, input, self.num_embeddings)
        values = dequantized(self.weight.detach()[rows], stats[rows], self.dtype)
        return values.view(*input.shape, self.embedding_dim)
