"""Mixture of Block Attention: own block plus the blocks whose mean key fits best (2502.13189)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern, whole_number
from sa_patch.patterns.block_selection.block_means import block_means
from sa_patch.patterns.block_selection.top_candidates import first_best
from sa_patch.patterns.block_topk import BlockTopK


@dataclass(frozen=True)
class MoBA(Pattern):
    """Query i sees its own block up to itself, and ``topk - 1`` chosen earlier blocks whole.

    Chosen are, per query head, the earlier complete blocks whose mean key has the largest fp32
    dot product with the query (with grouped-query attention: the mean key of its KV head);
    of equal ones the earlier (arXiv 2502.13189).

    With `shared` above 1 a tile of so many queries, by position, shares its choices: query i sees
    the blocks that the queries of its tile up to i chose. With `grouped` the query heads that share
    a KV head choose together, by the sum of their queries.

    Args:
        block_size: tokens in a block, at least 1.
        topk: blocks in view, the query's own among them, at least 1; more by `shared`.
        shared: queries that share their choices; 1 for none.
        grouped: one choice for the query heads that share a KV head.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    block_size: int = field(metadata={"always": True})
    topk: int = field(default=2, metadata={"always": True})
    shared: int = 1
    grouped: bool = False

    name: ClassVar[str] = "moba"
    summary: ClassVar[str] = "mixture of block attention: own block + best blocks (2502.13189)"
    reads_content: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number(self.block_size, "block_size", 1)
        whole_number(self.topk, "topk", 1)
        whole_number(self.shared, "shared", 1)
        if not isinstance(self.grouped, bool):
            raise UserError(f"grouped must be true or false, got {self.grouped!r}")

    @classmethod
    def from_window(
        cls, window: int, topk: int = 2, shared: int = 1, grouped: bool = False
    ) -> MoBA:
        """The pattern whose `topk` blocks hold `window` tokens together.

        Raises:
            UserError: if `window` is not a multiple of `topk`.
        """
        whole_number(topk, "topk", 1)
        whole_number(window, "window", 1)
        if window % topk:
            raise UserError(
                f"moba's window must be a multiple of topk={topk} (blocks of window / topk tokens),"
                f" got window={window}"
            )
        return cls(window // topk, topk, shared, grouped)

    @property
    def computed_as(self) -> Pattern:
        """With choices that queries or heads share, the same pattern in `BlockTopK`'s terms."""
        if self.shared == 1 and not self.grouped:
            return self
        return self._blocks

    @property
    def _blocks(self) -> BlockTopK:
        return BlockTopK(
            self.block_size,
            self.topk - 1,
            sinks=0,
            local=0,
            branch=0,
            grouped=self.grouped,
            shared=self.shared,
        )

    def rank_blocks(self, q: Tensor, means: Tensor, query_blocks: Tensor) -> Tensor:
        """The earlier blocks that every query chooses, best first.

        Args:
            q: ``[q_heads, nq, head_dim]``.
            means: fp32 ``[kv_heads, blocks, head_dim]``, of `block_means`.
            query_blocks: int64 ``[nq]``, the own block of each query.

        Returns:
            int64 ``[q_heads, nq, min(topk - 1, blocks)]``; -1 where no earlier block is left.
        """
        heads, queries = q.shape[0], q.shape[1]
        kv_heads, blocks = means.shape[0], means.shape[1]
        picks = min(self.topk - 1, blocks)
        ranks = torch.arange(picks, device=q.device)
        # A choice of all earlier blocks needs no ranking, and a NaN score must not hide a block.
        if picks == blocks:
            return ranks.where(ranks < query_blocks[:, None], -1).expand(heads, -1, -1)
        grouped = q.float().reshape(kv_heads, heads // kv_heads * queries, -1)
        scores = (grouped @ means.transpose(1, 2)).reshape(heads, queries, blocks)
        later = torch.arange(blocks, device=q.device) >= query_blocks[:, None]
        # A score of an earlier block stays above what marks the others, however low it is.
        scores = scores.clamp_(min=torch.finfo(scores.dtype).min).masked_fill_(later, -torch.inf)
        best = first_best(scores, picks)
        return best.masked_fill(ranks >= query_blocks[:, None], -1)

    def choose_blocks(self, q: Tensor, means: Tensor, query_blocks: Tensor) -> Tensor:
        """Mark the blocks of `rank_blocks`: bool ``[q_heads, nq, blocks]``.

        A query's own block is never marked.
        """
        best = self.rank_blocks(q, means, query_blocks)
        # A column too many takes the marks of those that have no block left to choose.
        marks = torch.zeros(*best.shape[:2], means.shape[1] + 1, dtype=torch.bool, device=q.device)
        return marks.scatter_(-1, best.where(best >= 0, means.shape[1]), True)[..., :-1]

    def visible(
        self,
        query_positions: Tensor,
        seq_len: int,
        *,
        layer: int = 0,
        heads: int = 1,
        q: Tensor | None = None,
        k: Tensor | None = None,
    ) -> Tensor:
        if q is None or k is None:
            raise UserError("moba chooses blocks by content: visible() needs q and k")
        if self.computed_as is not self:
            return self._blocks.visible(
                query_positions, seq_len, layer=layer, heads=heads, q=q, k=k
            )
        query_blocks = query_positions // self.block_size
        chosen = self.choose_blocks(q, block_means(k, self.block_size), query_blocks)
        keys = torch.arange(seq_len, device=query_positions.device)
        key_blocks = keys // self.block_size
        own = key_blocks == query_blocks[:, None]
        # Keys of the incomplete last block can only be in view as a query's own block.
        padded = torch.nn.functional.pad(chosen, (0, 1))
        from_chosen = padded[..., key_blocks.clamp(max=chosen.shape[-1])]
        return (own | from_chosen) & (keys <= query_positions[:, None])

    def keys_per_query(self, seq_len: int) -> Tensor:
        return self._blocks.keys_per_query(seq_len)

    @property
    def shared_queries(self) -> int:
        return self.shared

    @property
    def counts_need_content(self) -> bool:
        return self.shared > 1

    def saturated(self, seq_len: int) -> bool:
        return (seq_len - 1) // self.block_size < self.topk

    @property
    def effective_window(self) -> int | None:
        return self.block_size * self.topk

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        return self._blocks.count_visible(seq_len, layer=layer, heads=heads)

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        if self.topk == 1:
            return torch.zeros(seq_len, dtype=torch.float64)
        blocks = (torch.arange(seq_len) // self.block_size).double()
        return blocks / (group if self.grouped else 1)

    def means_read(self, positions: Tensor) -> int:
        return self._blocks.means_read(positions)
