# SPDX-License-Identifier: MIT
"""Embeddings with a packed 4-bit table, of which only the looked-up rows are dequantized."""

import torch
from torch import Tensor, nn

from ..quant.scales import NESTED_BLOCKSIZE, weight_arguments
from ..quant.state import QuantState
from .embedding import row_numbers
from .module4 import Module4bit, logger
from .params4 import Params4bit

__all__ = ["Embedding4bit", "EmbeddingFP4", "EmbeddingNF4"]


class Embedding4bit(Module4bit, nn.Embedding):
    """Embedding whose table is packed into 4 bits and frozen.

    The table is quantized when the layer is moved to a device, also to the CPU. A lookup
    dequantizes the rows that it returns, and nothing else. Scales are not quantized again.

    A quantized embedding is saved and loaded like :class:`Linear4bit`; the state dict of one that
    is not quantized yet is refused, so that nobody saves a table they believe to be packed.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Length of a row.
        dtype: dtype of the table before it is packed, and of the result.
        quant_type: ``"fp4"`` or ``"nf4"``.
        quant_storage: dtype that the packed bytes are held in.
        device: Where the table is created.

    Example:
        >>> import torch
        >>> import bitsandbytes as bnb
        >>> layer = bnb.nn.Embedding4bit(100, 64, quant_type="nf4").to("cpu")
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=None,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state = None
        self.quant_storage = quant_storage
        blocksize = self.weight.blocksize
        if embedding_dim % blocksize:
            logger.warning(
                "%s: embedding_dim %d is not a multiple of the block size %d: blocks of scales "
                "cross rows, which makes inference slower",
                type(self).__name__,
                embedding_dim,
                blocksize,
            )

    def _shape(self) -> list[int]:
        return [self.num_embeddings, self.embedding_dim]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.quant_state is None and getattr(self.weight, "quant_state", None) is None:
            raise NotImplementedError(
                f"{type(self).__name__}: an embedding that is not quantized has no state dict; "
                "move it to a device first, as in layer.to(device)"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the rows `input` (integers of any shape), ``[..., embedding_dim]``."""
        packed, state = self._packed_weight(input.device)
        rows = row_numbers(type(self).__name__, input, self.num_embeddings)
        values = dequantize_rows(packed, state, rows, self.dtype)
        return values.view(*input.shape, self.embedding_dim)


def dequantize_rows(packed: Tensor, state: QuantState, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantizes some rows of a packed matrix.

    Args:
        packed: Packed codes of the matrix ``[N, K]``.
        state: State of the codes.
        rows: int64 ``[n]``, from 0 to N - 1.
        dtype: dtype of the result.

    Returns:
        ``[n, K]``, the same numbers that dequantizing the whole matrix gives.
    """
    columns, blocksize = state.shape[1], state.blocksize
    first = rows * columns
    # As many whole blocks as a row may touch; they begin at a byte.
    aligned = columns % blocksize == 0
    count = columns // blocksize if aligned else (columns - 2) // blocksize + 2
    blocks = (first // blocksize).unsqueeze(1) + torch.arange(count, device=rows.device)

    (_, scales, _, quant_type), nested = weight_arguments(state, rows.device)
    codes = packed.detach().reshape(-1).view(torch.uint8)
    width = blocksize // 2
    places = blocks.unsqueeze(2) * width + torch.arange(width, device=rows.device)
    # What lies behind the end belongs to no row and is cut off below.
    codes = codes[places.clamp_(max=codes.numel() - 1)].view(-1, 1)
    blocks = blocks.clamp_(max=-(-state.shape.numel() // blocksize) - 1)
    scales = _scales(scales, nested, blocks.flatten())

    shape = [rows.numel(), count * blocksize]
    dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
    values = dequantize(codes, scales, blocksize, quant_type, shape, dtype)
    if aligned:
        return values
    offset = (first % blocksize).unsqueeze(1) + torch.arange(columns, device=rows.device)
    return values.gather(1, offset)


def _scales(scales: Tensor, nested: tuple, blocks: Tensor) -> Tensor:
    """Returns the scales of some blocks, from those of all or from the codes of those."""
    if not nested:
        return scales[blocks]
    codes, code, offset = nested
    return code[codes[blocks].long()] * scales[blocks // NESTED_BLOCKSIZE] + offset


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` in FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` in NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)
