"""Prism: blocks chosen by means in two bands of rotary frequencies (2602.08426)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.block_choice import covering, mean_of_blocks, share, whole_blocks
from sa_patch.patterns.rivals.whole_prompt import Chooser, Thresholded, per_query_head


@dataclass(frozen=True)
class Prism(Thresholded):
    """A block of queries sees itself, the first block, and the best by either of two bands.

    A mean over a block wipes out what turns fast under rotary embeddings, so that scores of means
    tell next to nothing of positions. Prism weighs blocks twice, by a softmax over products of
    means in the highest frequencies alone and in the lowest alone, each with a temperature that
    makes up for the energy that the band lost: ``sqrt(band / head_dim)`` times the band's root mean
    square over that of all dimensions, of mean queries and of mean keys. Of each band the fewest
    blocks with the share `threshold` of the weight are in view (arXiv 2602.08426). The bands
    overlap where their shares add up to more than 1. Each query head chooses for itself.

    Dimension d and ``d + head_dim / 2`` are taken for a pair, the first for the fastest: the layout
    of Llama, Qwen and their like.

    A query's choice depends on later tokens: on its block's, and by the temperatures on all.

    Args:
        threshold: share of the weight in view, above 0 and at most 1.
        block_size: tokens in a block, at least 1.
        high, low: share of the dimensions in each band, above 0 and at most 1.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    threshold: float = field(default=0.95, metadata={"always": True})
    block_size: int = field(default=128, metadata={"always": True})
    high: float = 0.5
    low: float = 0.75

    name: ClassVar[str] = "prism"
    summary: ClassVar[str] = "blocks by means in two bands of frequencies (Prism, 2602.08426)"

    def __post_init__(self) -> None:
        for name in ("threshold", "high", "low"):
            share(getattr(self, name), name, least=1e-6)
        whole_number(self.block_size, "block_size", 1)

    @property
    def tile(self) -> int:
        return self.block_size

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        means = (
            mean_of_blocks(q, self.block_size),
            per_query_head(mean_of_blocks(k, self.block_size), q),
        )
        bands = [_tempered(*means, places) for places in self._bands(q.shape[2], q.device)]

        def choose(tile: int) -> Tensor:
            certain = torch.zeros(tile + 1, dtype=torch.bool, device=q.device)
            nothing = certain.clone()
            certain[:: max(1, tile)] = True
            chosen = certain.expand(len(q), -1)
            for queries, keys in bands:
                scores = (keys[:, : tile + 1] @ queries[:, tile, :, None])[..., 0]
                chosen = chosen | covering(scores.softmax(-1), nothing, self.threshold)
            return whole_blocks(chosen, self.block_size)

        return choose

    def _bands(self, head_dim: int, device: torch.device) -> list[Tensor]:
        """Dimensions of the high and of the low band: int64 ``[dims]`` each."""
        half = max(1, head_dim // 2)
        wide = [max(1, round(of * half)) for of in (self.high, self.low)]
        pairs = torch.arange(half, device=device)
        return [
            torch.cat([own, own + half])[: 2 * len(own) if head_dim > 1 else 1]
            for own in (pairs[: wide[0]], pairs[half - wide[1] :])
        ]

    def saturated(self, seq_len: int) -> bool:
        # The first block and a query's own are always in view.
        return seq_len <= 2 * self.block_size or self.threshold >= 1

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        blocks = (torch.arange(seq_len) // self.block_size + 1).double()
        return blocks / self.block_size * (self.high + self.low)

    def means_read(self, positions: Tensor) -> int:
        return int(positions.max()) // self.block_size + 1


def _tempered(queries: Tensor, keys: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Mean queries and keys of a band, scaled by its width and temperature.

    Args:
        queries, keys: ``[q_heads, blocks, head_dim]``.
        places: int64 ``[dims]``, of the band.
    """
    parts = [_root_mean_square(x[..., places]) / _root_mean_square(x) for x in (queries, keys)]
    temperature = (len(places) / queries.shape[2]) ** 0.5 * parts[0] * parts[1]
    return queries[..., places] / (temperature * len(places) ** 0.5), keys[..., places]


def _root_mean_square(x: Tensor) -> Tensor:
    """Of each head's ``x [q_heads, blocks, dims]``: ``[q_heads, 1, 1]``, above 0."""
    return x.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)
