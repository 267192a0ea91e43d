"""A small encoder that classifies texts, with fractional or dot-product attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sa_patch.training.classification.settings import Classifier
from sa_patch.training.fractional.module import FractionalAttention

_EMBEDDING_STD = 0.02


class TextClassifier(nn.Module):
    """Embeddings of words and of positions, encoder layers, and the mean over real tokens.

    A layer is self-attention and a feed-forward network, each on the layer norm of its input and
    added to it. All attentions have the same parameters and the same start from the same seed.

    Args:
        settings: sizes and attention.
        vocabulary, classes: how many words and labels there are.
    """

    def __init__(self, settings: Classifier, vocabulary: int, classes: int) -> None:
        super().__init__()
        hidden = settings.heads * settings.head_dim
        self.words = nn.Embedding(vocabulary, hidden, padding_idx=0)
        self.places = nn.Embedding(settings.max_length, hidden)
        # Of the usual size 1, rare words would drown what the frequent ones have learnt.
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=_EMBEDDING_STD)
        self.drop = nn.Dropout(settings.dropout)
        self.layers = nn.ModuleList(_Layer(settings, hidden, i) for i in range(settings.layers))
        self.norm = nn.LayerNorm(hidden)
        self.classes = nn.Linear(hidden, classes)

    def forward(self, words: Tensor, real: Tensor) -> Tensor:
        """Logits ``[batch, classes]``.

        Args:
            words: int64 ``[batch, n]``.
            real: bool ``[batch, n]``, True at real tokens, of which each text has at least one.
        """
        hidden = self._embed(words)
        for layer in self.layers:
            hidden = layer(hidden, real)
        kept = real[..., None]
        mean = self.norm(hidden).masked_fill(~kept, 0).sum(1) / kept.sum(1)
        logits: Tensor = self.classes(mean)
        return logits

    def attention_weights(self, words: Tensor, real: Tensor) -> Tensor:
        """Weights of every layer's heads: ``[layers, batch, heads, n, n]``; see `forward`."""
        hidden = self._embed(words)
        found = []
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            found.append(layer.attention_weights(hidden, real))
            hidden = layer(hidden, real)
        return torch.stack(found)

    def _embed(self, words: Tensor) -> Tensor:
        places = torch.arange(words.shape[1], device=words.device)
        embedded: Tensor = self.drop(self.words(words) + self.places(places))
        return embedded


class _Layer(nn.Module):
    def __init__(self, settings: Classifier, hidden: int, index: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = FractionalAttention(
            hidden,
            settings.heads,
            settings.head_dim,
            settings.alpha,
            shared=settings.shared,
            orthonormal=settings.orthonormal,
            geometry=settings.geometry,
            bandwidth=settings.bandwidth,
            density=settings.density,
            layer=index,
        )
        self.feed = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )
        self.drop = nn.Dropout(settings.dropout)

    def attention_weights(self, hidden: Tensor, real: Tensor) -> Tensor:
        return self.attention.weights(self.attention_norm(hidden), real)

    def forward(self, hidden: Tensor, real: Tensor) -> Tensor:
        hidden = hidden + self.drop(self.attention(self.attention_norm(hidden), real))
        out: Tensor = hidden + self.drop(self.feed(self.feed_norm(hidden)))
        return out
