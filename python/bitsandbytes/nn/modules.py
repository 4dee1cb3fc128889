# SPDX-License-Identifier: MIT
"""Old import path of the layers."""

from .embedding import Embedding, StableEmbedding
from .embedding4 import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from .embedding8 import Embedding8bit
from .linear4 import Linear4bit, LinearFP4, LinearNF4
from .linear8 import Linear8bitLt
from .outlier_aware import OutlierAwareLinear
from .params import Int8Params
from .params4 import Params4bit

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
]
