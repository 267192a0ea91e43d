"""SpargeAttn: blocks chosen by means, where a block resembles its mean (2502.18137)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.block_choice import mean_of_blocks, share, whole_blocks
from sa_patch.patterns.rivals.whole_prompt import Chooser, Thresholded, per_query_head


@dataclass(frozen=True)
class Sparge(Thresholded):
    """A tile of queries sees itself, blocks that no mean stands for, and the best by their means.

    A block can be told by its mean if its vectors are alike: if the mean cosine of all pairs of
    them, each with itself too, is above `similarity`. A tile of `rows` queries weighs such blocks
    of keys by a softmax over the products of means. In view are the largest weights that together
    are no more than the share `threshold`, at least one of them, and all blocks that are not alike;
    everything, if the tile's own queries are not alike (arXiv 2502.18137, first stage). The tile's
    own blocks are added, so that every query sees itself. Each query head chooses for itself.

    The paper's second stage, which leaves out values where softmax weights are near zero and keeps
    these in the sum, is no choice of visible keys, and not part of this, nor are two
    options of the authors' code: to show the first block always (write ``sinks:4+sparge:0.9,64``),
    and to take the mean key off before keys are compared.

    A query's choice depends on the later queries and keys of its tile.

    Args:
        threshold: share of the weight in view, above 0 and at most 1.
        block_size: tokens in a block of keys, at least 1.
        rows: queries in a tile, a multiple of `block_size`; two blocks unless given.
        similarity: mean cosine above which a block is told by its mean, from -1 to 1.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    threshold: float = field(default=0.9, metadata={"always": True})
    block_size: int = field(default=64, metadata={"always": True})
    rows: int = 0
    similarity: float = 0.1

    name: ClassVar[str] = "sparge"
    summary: ClassVar[str] = "blocks by means, where vectors are alike (SpargeAttn, 2502.18137)"

    def __post_init__(self) -> None:
        share(self.threshold, "threshold", least=1e-6)
        share(self.similarity, "similarity", least=-1)
        whole_number(self.block_size, "block_size", 1)
        if not whole_number(self.rows, "rows", 0):
            object.__setattr__(self, "rows", 2 * self.block_size)
        if self.rows % self.block_size:
            raise UserError(
                f"rows must be a multiple of block_size={self.block_size}, got {self.rows}"
            )

    @property
    def tile(self) -> int:
        return self.rows

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        of_tile = self.rows // self.block_size
        alike = per_query_head(_cosines(k, self.block_size) > self.similarity, q)
        tiles_alike = _cosines(q, self.rows) > self.similarity
        means = per_query_head(mean_of_blocks(k, self.block_size) * q.shape[2] ** -0.5, q)
        queries = mean_of_blocks(q, self.rows)

        def choose(tile: int) -> Tensor:
            end = (tile + 1) * of_tile
            told = alike[:, :end]
            scores = (means[:, :end] @ queries[:, tile, :, None])[..., 0]
            # Of a head without any block that is told by its mean the weights are NaN.
            weights = scores.masked_fill(~told, -torch.inf).softmax(-1).nan_to_num(nan=0.0)
            chosen = _within(weights, self.threshold) | ~told | ~tiles_alike[:, tile, None]
            chosen[:, tile * of_tile :] = True
            return whole_blocks(chosen, self.block_size)

        return choose

    def saturated(self, seq_len: int) -> bool:
        return seq_len <= self.rows or self.similarity >= 1

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        blocks = (torch.arange(seq_len) // self.rows + 1) * (self.rows // self.block_size)
        # Beside the products of means, each query and key is normalized once.
        return blocks.double() / self.rows + 1 + 1 / group

    def means_read(self, positions: Tensor) -> int:
        return int(positions.max()) // self.block_size + 1


def _cosines(x: Tensor, size: int) -> Tensor:
    """Mean cosine of all pairs of each block's vectors: ``[heads, blocks]``."""
    return mean_of_blocks(normalize(x, dim=-1), size).square().sum(-1)


def _within(weights: Tensor, wanted: float) -> Tensor:
    """The largest weights that together are at most a share of all, one at least: bool."""
    order = weights.sort(dim=-1, descending=True, stable=True).indices
    together = weights.double().gather(-1, order).cumsum(-1)
    kept = together <= wanted * together[..., -1:]
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)
