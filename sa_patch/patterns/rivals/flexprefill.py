"""FlexPrefill: each head takes blocks by columns and diagonals, or by block means (2502.20766)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.block_choice import (
    covering,
    mean_of_blocks,
    most,
    share,
    whole_blocks,
)
from sa_patch.patterns.rivals.whole_prompt import (
    Chooser,
    Thresholded,
    by_distance,
    causal_scores,
    per_query_head,
)


@dataclass(frozen=True)
class FlexPrefill(Thresholded):
    """Query i sees itself, the first block, and what the last block of queries tells its head.

    The last `block_size` queries stand for a prompt (arXiv 2502.20766). Their
    attention, summed over blocks of keys, is compared with a softmax of the mean of these queries
    and the mean keys of the blocks. Where the root of the Jensen-Shannon divergence is below `tau`,
    means can be trusted: each block of queries weighs blocks of keys by a softmax over means, and
    the fewest pairs of blocks are taken, the largest first, that hold the share `gamma` of the
    weight of the whole head. Other heads take columns of blocks and diagonals of blocks: for each
    the fewest, and `minimum` at least, that hold the share `gamma` of the attention of the last
    queries. The first column and the main diagonal are always in view.

    Everything is chosen in blocks, as in the paper's kernel. The choice is made by the last
    queries, and by means of whole blocks: what an early query sees depends on all later tokens.

    Args:
        gamma: share of attention, above 0 and at most 1.
        block_size: tokens in a block, at least 1.
        tau: largest divergence at which a head chooses by means, from 0 to 1; 0 for no head.
        minimum: least number of columns, and of diagonals, at least 1.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    gamma: float = field(default=0.95, metadata={"always": True})
    block_size: int = field(default=128, metadata={"always": True})
    tau: float = 0.1
    minimum: int = 1

    name: ClassVar[str] = "flexprefill"
    summary: ClassVar[str] = "each head by columns and diagonals, or by block means (2502.20766)"

    def __post_init__(self) -> None:
        share(self.gamma, "gamma", least=1e-6)
        share(self.tau, "tau", least=0)
        whole_number(self.block_size, "block_size", 1)
        whole_number(self.minimum, "minimum", 1)

    @property
    def tile(self) -> int:
        return self.block_size

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        size, n = self.block_size, q.shape[1]
        first = max(0, n - size)
        weights = causal_scores(q[:, first:], k, first).softmax(-1) / (n - first)
        columns = _summed(weights.sum(1), size)
        distances = _summed(by_distance(weights, first), size)
        means = mean_of_blocks(k, size) * q.shape[2] ** -0.5
        representative = q[:, first:].mean(1, keepdim=True) @ per_query_head(means, q).mT
        by_means = _divergence(representative[:, 0].softmax(-1), columns).sqrt() < self.tau
        certain = torch.arange(columns.shape[1], device=q.device) == 0
        columns, distances = (
            covering(x, certain, self.gamma) | most(x, certain, self.minimum)
            for x in (columns, distances)
        )
        pairs = self._pairs(q, means)

        def choose(tile: int) -> Tensor:
            by_lines = columns[:, : tile + 1] | distances[:, : tile + 1].flip(1)
            ends = torch.zeros_like(by_lines)
            ends[:, :: max(1, tile)] = True
            by_pairs = pairs[:, tile, : tile + 1] | ends
            return whole_blocks(torch.where(by_means[:, None], by_pairs, by_lines), size)

        return choose

    def _pairs(self, q: Tensor, means: Tensor) -> Tensor:
        """Pairs of blocks that hold the share of a head's weight: bool ``[q_heads, blocks,
        blocks]``.

        Args:
            means: scaled mean keys ``[kv_heads, blocks, head_dim]``.
        """
        scores = mean_of_blocks(q, self.block_size) @ per_query_head(means, q).mT
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        nothing = torch.zeros(1, dtype=torch.bool, device=q.device)
        chosen = covering(weights.flatten(1), nothing, self.gamma)
        return chosen.unflatten(1, scores.shape[1:])

    def saturated(self, seq_len: int) -> bool:
        # The first block and a query's own are always in view.
        return seq_len <= 2 * self.block_size or self.gamma >= 1

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        i = torch.arange(seq_len, dtype=torch.float64)
        last = (i + 1).where(i >= seq_len - self.block_size, 0)
        # A block's mean query meets the mean of each block so far.
        return last + (i // self.block_size + 1) / self.block_size

    def means_read(self, positions: Tensor) -> int:
        # The last tiles read all keys, which is a block for each tile; means are read besides.
        return max(self.block_size, len(positions)) + int(positions.max()) // self.block_size + 1


def _summed(x: Tensor, size: int) -> Tensor:
    """Sums of blocks: ``[heads, n]`` to ``[heads, blocks]``."""
    return pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size)).sum(2)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions ``[heads, blocks]``, natural logarithms."""
    middle = (p + q) / 2
    parts = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)]
    return (parts[0] + parts[1]).sum(-1).clamp(min=0) / 2
