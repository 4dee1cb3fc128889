# SPDX-License-Identifier: MIT
"""Old import path of the layers."""

from .embedding import Embedding, StableEmbedding
from .linear8 import Linear8bitLt
from .params import Int8Params

__all__ = ["Embedding", "Int8Params", "Linear8bitLt", "StableEmbedding"]
