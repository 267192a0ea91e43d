"""MInference's vertical-slash pattern: columns and diagonals that the last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.block_selection.top_candidates import first_best
from sa_patch.patterns.rivals.whole_prompt import (
    Chooser,
    WholePrompt,
    by_distance,
    causal_scores,
)


@dataclass(frozen=True)
class VerticalSlash(WholePrompt):
    """Query i sees `vertical` columns of keys, and `slash` diagonals of distances.

    Each query head chooses them once for a prompt: the softmax of its last `last` queries over all
    keys is summed by column and by diagonal (arXiv 2407.02490), and
    the largest sums win, of equal ones the earlier column and the nearer diagonal. The first
    `sinks` columns and the nearest `local` diagonals are always among them. As in the paper's
    kernel, a diagonal is a staircase of squares: a tile of `block_size` queries from position a on
    sees the `block_size` keys from ``a - distance`` on, as far as they are no later than a query.

    The choice is made by the last queries: what an early query sees depends on all later tokens,
    and so it serves whole prompts alone.

    Args:
        vertical: columns, at least 1.
        slash: diagonals, at least 1.
        last: queries that choose, at least 1.
        sinks: first columns that are always chosen, at most `vertical`; 30 or all unless given.
        local: nearest diagonals that are always chosen, the query's own key among them, from 1 to
            `slash`; 100 or all unless given.
        block_size: width of a diagonal's squares, at least 1; with 1 it is a line.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    vertical: int = field(default=1000, metadata={"always": True})
    slash: int = field(default=6096, metadata={"always": True})
    last: int = 64
    sinks: int = -1
    local: int = -1
    block_size: int = 64

    name: ClassVar[str] = "vertical_slash"
    summary: ClassVar[str] = "columns and diagonals that the last queries attend to (2407.02490)"

    def __post_init__(self) -> None:
        for name in ("vertical", "slash", "last", "block_size"):
            whole_number(getattr(self, name), name, 1)
        for name, of, usual, least in (("sinks", "vertical", 30, 0), ("local", "slash", 100, 1)):
            most = getattr(self, of)
            if getattr(self, name) == -1:
                object.__setattr__(self, name, min(usual, most))
            if whole_number(getattr(self, name), name, least) > most:
                raise UserError(f"{name} must be at most {of}={most}, got {getattr(self, name)}")

    @property
    def tile(self) -> int:
        return self.block_size

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        n = q.shape[1]
        columns, distances = self._chosen(q, k)

        def choose(tile: int) -> Tensor:
            low = tile * self.block_size
            high = min(low + self.block_size, n)
            chosen = columns[:, :high].clone()
            # Key j lies in the square of distance s where low - j <= s < low - j + block_size.
            reach = torch.nn.functional.pad(distances[:, :high], (1, 0)).cumsum(1)
            nearest = low - torch.arange(high, device=q.device)
            within = [(nearest + x).clamp(0, high) for x in (self.block_size, 0)]
            chosen |= reach[:, within[0]] > reach[:, within[1]]
            return chosen[:, None]

        return choose

    def _chosen(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Columns and distances of every query head: bool ``[q_heads, n]`` each."""
        n = q.shape[1]
        first = max(0, n - self.last)
        weights = causal_scores(q[:, first:], k, first).softmax(-1)
        return (
            _largest(weights.sum(1), self.vertical, self.sinks),
            _largest(by_distance(weights, first), self.slash, self.local),
        )

    def keys_per_query(self, seq_len: int) -> Tensor:
        """As if columns and diagonals were drawn at random; they overlap more in truth."""
        n = seq_len
        i = torch.arange(n, dtype=torch.float64)
        drawn = [
            max(0, min(count, n) - certain) / max(1, n - certain)
            for count, certain in ((self.vertical, self.sinks), (self.slash, self.local))
        ]
        # A key is hidden if neither its column nor one of block_size diagonals was drawn.
        hidden = (1 - drawn[0]) * (1 - drawn[1]) ** self.block_size
        reach = self.local + (i % self.block_size)
        rest = (i + 1 - self.sinks - reach).clamp(min=0)
        return i + 1 - rest * hidden

    def saturated(self, seq_len: int) -> bool:
        return seq_len <= max(self.vertical, self.slash, self.block_size)

    @property
    def effective_window(self) -> int | None:
        return self.vertical + self.slash

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        i = torch.arange(seq_len, dtype=torch.float64)
        return (i + 1).where(i >= seq_len - self.last, 0)

    def means_read(self, positions: Tensor) -> int:
        # The tiles of the last queries read all keys, which is so much for each tile of a prompt.
        return max(self.last, len(positions))


def _largest(sums: Tensor, count: int, certain: int) -> Tensor:
    """The first `certain` and the largest others, `count` in all: bool like ``sums [heads, n]``."""
    count = min(count, sums.shape[1])
    sums = sums.nan_to_num(nan=0.0)
    sums[:, :certain] = torch.inf
    marks = torch.zeros_like(sums, dtype=torch.bool)
    return marks.scatter_(1, first_best(sums, count), True)
