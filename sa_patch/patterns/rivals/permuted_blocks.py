"""PBS-Attn: keys sorted by importance within segments, then cut into blocks (2510.21270)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.block_choice import BlockChoice, Mass, mean_of_blocks
from sa_patch.patterns.rivals.whole_prompt import Chooser, per_query_head


@dataclass(frozen=True)
class PermutedBlocks(BlockChoice):
    """Query i sees its segment so far, and chosen blocks of sorted keys from earlier segments.

    For each query head the keys of every segment are sorted by importance: by the mean weight that
    the last `block_size` queries of the prompt give them, in a softmax over all keys (arXiv
    2510.21270); so keys that matter stand in few blocks. Sorted keys are cut into
    blocks, and a block of queries weighs those of earlier segments by a softmax over the products
    of means. In view are the block that holds the first token, and the best others: `topk` blocks
    in all, or the fewest with the share `threshold` of the weight. Keys stay in their segments, so
    that earlier segments hold earlier keys alone.

    The order is made by the last queries: what an early query sees depends on all later tokens.

    Args:
        block_size: tokens in a block, at least 1.
        topk: blocks from earlier segments in view, at least 1; 0 to choose by `threshold`.
        threshold: share of the weight in view, above 0; 0.9 unless this or `topk` is given.
        segment: tokens in a segment, a multiple of `block_size`; two blocks unless given.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    block_size: int = field(default=128, metadata={"always": True})
    topk: int = 0
    threshold: float = 0.0
    segment: int = 0

    name: ClassVar[str] = "permuted_blocks"
    summary: ClassVar[str] = "blocks of keys sorted within segments (PBS-Attn, 2510.21270)"
    least_blocks: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.check_choice(usual=0.9)
        if not whole_number(self.segment, "segment", 0):
            object.__setattr__(self, "segment", 2 * self.block_size)
        if self.segment % self.block_size:
            raise UserError(
                f"segment must be a multiple of block_size={self.block_size}, got {self.segment}"
            )

    def _earlier(self, positions: Tensor) -> Tensor:
        """Blocks of the segments before that of each position."""
        return positions // self.segment * (self.segment // self.block_size)

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        n, size = q.shape[1], self.block_size
        order = self._order(q, k)
        in_order = per_query_head(k, q).gather(1, order[..., None].expand(-1, -1, k.shape[2]))
        mass = self.mass(q, in_order)
        # The place of the first token tells the block that holds it.
        holds_first = torch.arange(-(-n // size), device=q.device) == (
            (order == 0).byte().argmax(1, keepdim=True) // size
        )

        def choose(tile: int) -> Tensor:
            start = tile * size // self.segment * self.segment
            end = min(start + self.segment, n)
            chosen = torch.ones(len(q), end, dtype=torch.bool, device=q.device)
            if start:
                blocks = self.chosen(mass(tile), holds_first[:, : start // size])
                chosen.scatter_(1, order[:, :start], blocks.repeat_interleave(size, dim=1))
            return chosen[:, None]

        return choose

    def _order(self, q: Tensor, k: Tensor) -> Tensor:
        """For each place the key that stands there: int64 ``[q_heads, n]``."""
        n = q.shape[1]
        last = q[:, max(0, n - self.block_size) :].unflatten(0, (len(k), -1))
        scores = last @ k[:, None].mT * q.shape[2] ** -0.5
        weights = scores.softmax(-1).mean(2).flatten(0, 1)
        # A segment that is not complete is nobody's earlier one, and keeps its order.
        sorted_part = n // self.segment * self.segment
        in_segments = weights[:, :sorted_part].unflatten(1, (-1, self.segment))
        places = in_segments.sort(dim=-1, descending=True, stable=True).indices
        starts = torch.arange(0, sorted_part, self.segment, device=q.device)
        order = torch.arange(n, device=q.device).repeat(len(q), 1)
        order[:, :sorted_part] = (places + starts[:, None]).flatten(1)
        return order

    def mass(self, q: Tensor, k: Tensor) -> Mass:
        """Weights of the blocks of earlier segments.

        Args:
            k: in order, for each query head: ``[q_heads, n, head_dim]``.
        """
        means = mean_of_blocks(k, self.block_size) * q.shape[2] ** -0.5
        queries = mean_of_blocks(q, self.block_size)

        def mass(tile: int) -> Tensor:
            blocks = tile * self.block_size // self.segment * self.segment // self.block_size
            return (means[:, :blocks] @ queries[:, tile, :, None])[..., 0].softmax(-1)

        return mass

    def keys_per_query(self, seq_len: int) -> Tensor:
        """Visible keys; under a threshold the most that there may be, which is all of them."""
        i = torch.arange(seq_len)
        hidden = (self._earlier(i) - self.topk).clamp(min=0) if self.topk else 0 * i
        return (i + 1 - hidden * self.block_size).double()

    def saturated(self, seq_len: int) -> bool:
        earlier = int(self._earlier(torch.tensor(max(0, seq_len - 1))))
        # The block of the first token is always in view.
        return earlier <= max(self.topk, 1) or self.threshold >= 1

    @property
    def effective_window(self) -> int | None:
        """A segment and the chosen blocks; None where the text decides how many there are."""
        return self.segment + self.block_size * self.topk if self.topk else None

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        i = torch.arange(seq_len)
        last = seq_len * (i >= seq_len - self.block_size)
        return last + self._earlier(i).double() / self.block_size

    def means_read(self, positions: Tensor) -> int:
        # The last tiles read all keys, which is a block for each tile; means are read besides.
        return max(self.block_size, len(positions)) + int(self._earlier(positions.max()))
