"""FlashPrefill: blocks above a share of the largest, without sorting (2603.06199)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.block_choice import mean_of_blocks, share, whole_blocks
from sa_patch.patterns.rivals.whole_prompt import Chooser, Thresholded


@dataclass(frozen=True)
class FlashPrefill(Thresholded):
    """A block of queries sees the blocks whose attention is at least a share of the largest one.

    The attention of a block of queries to a block of keys is the sum, over the queries behind the
    whole block, of the exponential of their scaled score with its mean key. In view are the blocks
    with at least `alpha` times the largest sum, and always the first `sinks` blocks and the nearest
    `local` ones, its own among them; the last `last` blocks of a prompt see everything (arXiv
    2603.06199). Vertical lines, diagonals and blocks are found all alike, and
    nothing is sorted. Each query head chooses for itself.

    A query's choice depends on the later queries of its block, and what is last on n.

    Args:
        alpha: share of the largest sum, from 0, where everything is in view, to 1; 0.1 is no figure
            of the paper's.
        block_size: tokens in a block, at least 1.
        sinks, local, last: blocks; at least 0, `local` at least 1.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    alpha: float = field(default=0.1, metadata={"always": True})
    block_size: int = field(default=128, metadata={"always": True})
    sinks: int = 2
    local: int = 4
    last: int = 2

    name: ClassVar[str] = "flashprefill"
    summary: ClassVar[str] = "blocks above a share of the largest (FlashPrefill, 2603.06199)"

    def __post_init__(self) -> None:
        share(self.alpha, "alpha", least=0)
        for name, least in (("block_size", 1), ("sinks", 0), ("local", 1), ("last", 0)):
            whole_number(getattr(self, name), name, least)

    @property
    def tile(self) -> int:
        return self.block_size

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        size = self.block_size
        means = mean_of_blocks(k, size) * q.shape[2] ** -0.5
        tiles = means.shape[1]
        depth = math.log(self.alpha) if self.alpha else -math.inf

        def choose(tile: int) -> Tensor:
            queries = q[:, tile * size : (tile + 1) * size].unflatten(0, (len(k), -1))
            scores = (queries @ means[:, None, : tile + 1].mT).flatten(0, 1)
            if scores.shape[1] == size:
                # Of its own block the last query alone is behind all keys.
                scores[:, :-1, -1] = -torch.inf
            else:
                scores[:, :, -1] = -torch.inf
            sums = scores.logsumexp(1)
            chosen = sums >= sums.amax(-1, keepdim=True) + depth
            chosen[:, : self.sinks] = True
            chosen[:, max(0, tile + 1 - self.local) :] = True
            if tile >= tiles - self.last:
                chosen[:] = True
            return whole_blocks(chosen, size)

        return choose

    def saturated(self, seq_len: int) -> bool:
        blocks = -(-seq_len // self.block_size)
        return not self.alpha or blocks - self.last <= self.sinks + self.local

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        return (torch.arange(seq_len) // self.block_size + 1).double()

    def dense_end(self, seq_len: int) -> int:
        blocks = -(-seq_len // self.block_size)
        return seq_len - min(seq_len, max(0, blocks - self.last) * self.block_size)

    def means_read(self, positions: Tensor) -> int:
        return int(positions.max()) // self.block_size + 1
