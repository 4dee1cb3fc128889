# SPDX-License-Identifier: MIT
"""Embeddings for training with 8-bit optimizers: their optimizer states stay in 32 bits.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, section 2.3,
https://arxiv.org/abs/2110.02861. Embedding gradients of rare tokens are sparse and large, which
8-bit states would blur.
"""

import torch
from torch import Tensor, nn

from .._checks import check_dtype
from ..optim.overrides import GlobalOptimManager

__all__ = ["Embedding", "StableEmbedding", "row_numbers"]


class _Embedding32(nn.Embedding):
    """Xavier-uniform initialisation, and 32-bit optimizer states for the weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        GlobalOptimManager.get_instance().register_module_override(
            self, "weight", {"optim_bits": 32}
        )

    def reset_parameters(self) -> None:
        """Draws the weight from a Xavier-uniform distribution, with zeros in the padding row."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class Embedding(_Embedding32):
    """:class:`torch.nn.Embedding` whose optimizer states stay in 32 bits.

    The weight starts Xavier-uniform instead of normal, which 8-bit training needs for stability.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Length of a row.
        padding_idx: Row that is zero and gets no gradient.
        max_norm: Norm that rows are clipped to when they are looked up.
        norm_type: The p of that norm.
        scale_grad_by_freq: Whether gradients are divided by how often a row is in the batch.
        sparse: Whether the gradient is a sparse tensor.
        _weight: Weight to start from, instead of a random one.
        device: Where the weight is created.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> bnb.nn.Embedding(100, 16)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )


class StableEmbedding(_Embedding32):
    """Embedding followed by a layer norm, for stable training with 8-bit optimizers.

    The weight starts Xavier-uniform, its optimizer states stay in 32 bits, and the norm is
    computed in the dtype of its own parameters, float32 by default, whatever `dtype` is.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Length of a row.
        padding_idx: Row that is zero and gets no gradient.
        max_norm: Norm that rows are clipped to when they are looked up.
        norm_type: The p of that norm.
        scale_grad_by_freq: Whether gradients are divided by how often a row is in the batch.
        sparse: Whether the gradient is a sparse tensor.
        _weight: Weight to start from, instead of a random one.
        device: Where the weight and the norm are created.
        dtype: Dtype of the weight and of the result.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> bnb.nn.StableEmbedding(100, 16)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Looks up and normalises the rows `input` (integers of any shape)."""
        rows = super().forward(input)
        return self.norm(rows.to(self.norm.weight.dtype)).to(self.weight.dtype)


def row_numbers(layer: str, input: Tensor, count: int) -> Tensor:
    """Returns the numbers `input` of rows of a table of `count` rows, flat and int64.

    A number of no row is what it is for :class:`torch.nn.Embedding`: an IndexError on the CPU, an
    assertion of the device elsewhere.
    """
    check_dtype(layer, "input", input, torch.int32, torch.int64)
    rows = input.reshape(-1)
    # Chosen from so many zeros, which take no memory: whatever chooses checks the range, on the
    # device and without waiting for it.
    zeros = torch.zeros(1, dtype=torch.int64, device=rows.device).expand(count)
    return zeros.index_select(0, rows) + rows
