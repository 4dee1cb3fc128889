# SPDX-License-Identifier: MIT
"""Layers with quantized weights, and embeddings made for training with 8-bit optimizers."""

from . import modules, triton_based_modules
from .embedding import Embedding, StableEmbedding
from .embedding4 import Embedding4bit, EmbeddingFP4, EmbeddingNF4
from .embedding8 import Embedding8bit
from .experts import (
    experts_forward_4bit,
    group_by_expert,
    grouped_linear_4bit,
    replace_experts_4bit,
)
from .linear4 import Linear4bit, LinearFP4, LinearNF4
from .linear8 import Linear8bitLt
from .outlier_aware import OutlierAwareLinear
from .params import Int8Params
from .params4 import Params4bit
from .switchback import (
    StandardLinear,
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearVectorwise,
)

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
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearVectorwise",
    "experts_forward_4bit",
    "group_by_expert",
    "grouped_linear_4bit",
    "modules",
    "replace_experts_4bit",
    "triton_based_modules",
]
