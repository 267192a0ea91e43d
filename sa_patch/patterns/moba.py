"""Mixture of Block Attention: own block plus the blocks whose mean key fits best (2502.13189)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern, whole_number
from sa_patch.patterns.block_selection.top_candidates import first_best


def block_means(k: Tensor, block_size: int) -> Tensor:
    """Mean key of every complete block, in fp32.

    Args:
        k: ``[..., seq_len, head_dim]``.

    Returns:
        fp32 ``[..., seq_len // block_size, head_dim]``.
    """
    complete = k.shape[-2] // block_size
    blocks = k[..., : complete * block_size, :].unflatten(-2, (complete, block_size))
    return blocks.mean(-2, dtype=torch.float32)


@dataclass(frozen=True)
class MoBA(Pattern):
    """Query i sees its own block up to itself, and ``topk - 1`` chosen earlier blocks whole.

    Chosen are, per query head, the earlier complete blocks whose mean key has the largest fp32
    dot product with the query (with grouped-query attention: the mean key of its KV head);
    of equal ones the earlier (arXiv 2502.13189).

    Args:
        block_size: tokens in a block, at least 1.
        topk: blocks in view, the query's own among them, at least 1.

    Raises:
        UserError: if a parameter is not a whole number of at least 1.
    """

    block_size: int = field(metadata={"always": True})
    topk: int = field(default=2, metadata={"always": True})

    name: ClassVar[str] = "moba"
    summary: ClassVar[str] = "mixture of block attention: own block + best blocks (2502.13189)"
    reads_content: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number(self.block_size, "block_size", 1)
        whole_number(self.topk, "topk", 1)

    @classmethod
    def from_window(cls, window: int, topk: int = 2) -> MoBA:
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
        return cls(block_size=window // topk, topk=topk)

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
        return self.count_visible(seq_len)[0].double()

    def saturated(self, seq_len: int) -> bool:
        return (seq_len - 1) // self.block_size < self.topk

    @property
    def effective_window(self) -> int | None:
        return self.block_size * self.topk

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        # How many keys are seen does not depend on which blocks are chosen.
        positions = torch.arange(seq_len)
        chosen = (positions // self.block_size).clamp(max=self.topk - 1)
        return (chosen * self.block_size + positions % self.block_size + 1)[None]

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        if self.topk == 1:
            return torch.zeros(seq_len, dtype=torch.float64)
        return (torch.arange(seq_len) // self.block_size).double()
