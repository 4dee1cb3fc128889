# SPDX-License-Identifier: MIT
"""Layers with quantized weights, and embeddings made for training with 8-bit optimizers."""

from . import modules
from .embedding import Embedding, StableEmbedding
from .linear8 import Linear8bitLt
from .params import Int8Params

__all__ = ["Embedding", "Int8Params", "Linear8bitLt", "StableEmbedding", "modules"]
