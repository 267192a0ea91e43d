"""XAttention: blocks chosen by the sums of their antidiagonals (2503.16428)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.block_choice import BlockChoice, Mass
from sa_patch.patterns.rivals.whole_prompt import causal_scores

# Of scores that are computed together, whatever the size of blocks: few enough for long prompts.
_ROWS = 64


@dataclass(frozen=True)
class XAttention(BlockChoice):
    """A block of queries sees itself, the first block, and those with the largest antidiagonals.

    Queries and keys are taken in groups of `stride`. The score of two groups is the mean of their
    antidiagonal: of the last query with the first key, the last but one with the second, and so
    on. A softmax over the groups of keys so far, summed over both blocks, is a block's mass (arXiv
    2503.16428; what is missing of the last group counts as zero).
    Blocks are chosen for each query head, by a number of them or by their share of the mass. The
    paper's search for a threshold of each head is not part of this.

    A query's choice depends on the later queries and keys of its own block.

    Args:
        block_size: tokens in a block, a multiple of `stride`.
        stride: tokens in a group, at least 1.
        topk: blocks in view, own and first among them, at least 2; 0 to choose by `threshold`.
        threshold: share of the mass in view, above 0; 0.9 unless this or `topk` is given.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    block_size: int = field(default=128, metadata={"always": True})
    topk: int = 0
    threshold: float = 0.0
    stride: int = 8

    name: ClassVar[str] = "xattention"
    summary: ClassVar[str] = "blocks with the largest sums of antidiagonals (Xu et al., 2503.16428)"

    def __post_init__(self) -> None:
        self.check_choice(usual=0.9)
        if self.block_size % whole_number(self.stride, "stride", 1):
            raise UserError(
                f"block_size must be a multiple of stride={self.stride}, got {self.block_size}"
            )

    def mass(self, q: Tensor, k: Tensor) -> Mass:
        missing = -q.shape[1] % self.stride
        q_groups, k_groups = (
            pad(x, (0, 0, 0, missing)).unflatten(1, (-1, self.stride)) for x in (q, k)
        )
        # A product of rows of `stride` vectors sums up the antidiagonal.
        q_groups, k_groups = q_groups.flip(2).flatten(2), k_groups.flatten(2)
        of_block = self.block_size // self.stride
        tiles = max(1, _ROWS // of_block)
        # Rows are longer by the stride than the scale knows, and scores are means of so many.
        q_groups = q_groups * self.stride**-0.5

        @lru_cache(maxsize=1)
        def of_tiles(index: int) -> Tensor:
            """Of some tiles in a row: ``[q_heads, tiles, blocks]``."""
            first = index * tiles * of_block
            rows = q_groups[:, first : first + tiles * of_block]
            weights = causal_scores(rows, k_groups, first).softmax(-1)
            missing = [-size % of_block for size in weights.shape[1:]]
            whole = pad(weights, (0, missing[1], 0, missing[0]))
            return whole.unflatten(2, (-1, of_block)).sum(3).unflatten(1, (-1, of_block)).sum(2)

        def mass(tile: int) -> Tensor:
            return of_tiles(tile // tiles)[:, tile % tiles, : tile + 1]

        return mass

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        return (torch.arange(seq_len) // self.stride + 1).double()

    def means_read(self, positions: Tensor) -> int:
        # A row of scores stands for `stride` queries: a tile of rows reads all keys, once for so
        # many tiles of queries.
        return int(positions.max()) // self.stride + 1
