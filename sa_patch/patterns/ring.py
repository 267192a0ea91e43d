"""Tokens as points on a ring: what stochastic attention and its prefix-stable kin share.

A query sees the earlier tokens whose points lie near its own. Everything is integers, so that the
visible sets are exactly the same on every device and in every kernel.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern, Profile, Rule, whole_number

# Candidates that `count` compares at once.
_COUNT_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Ring:
    """The points of n tokens, for each draw (one that all heads share, or one for each head).

    Query i sees the keys ``j <= i`` with ``distance(points[i], points[j]) <= reach[i]``.

    Args:
        points: int64 ``[draws, n]``, from 0 on.
        reach: int64 ``[n]``, at least 0.
        size: circumference, larger than every point; None for an open line.
    """

    points: Tensor
    reach: Tensor
    size: int | None

    @property
    def seq_len(self) -> int:
        return self.points.shape[1]

    def rule(self) -> Rule:
        """Whether query i has key j within reach; causality is the caller's."""

        def within_reach(i: Tensor, j: Tensor) -> Tensor:
            distance = (self._points_of(i) - self._points_of(j)).abs_()
            if self.size is not None:
                distance = torch.minimum(distance, self.size - distance)
            return distance <= self.reach[i]

        return within_reach

    def _points_of(self, index: Tensor) -> Tensor:
        """``index [heads or 1, ...]`` to points of the same shape, with a draw for each head."""
        if len(self.points) == 1:
            return self.points[0][index]
        by_draw = index.expand(len(self.points), *index.shape[1:])
        return self.points.gather(1, by_draw.flatten(1)).view(by_draw.shape)

    def visible(self, query_positions: Tensor) -> Tensor:
        """bool ``[draws, nq, n]``."""
        keys = torch.arange(self.seq_len, device=self.points.device)
        i, j = query_positions[None, :, None], keys[None, None]
        return self.rule()(i, j) & (j <= i)

    def candidates(self, queries: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """The keys below `end` within reach of each query, later ones too.

        Args:
            queries: int64 ``[m]``, positions.

        Returns:
            keys int64 ``[draws, m, width]``, and which of them are meant: bool, the same shape.
            Every key occurs at most once for a query among those that are meant.
        """
        points = self.points[:, :end]
        order = points.argsort(dim=1, stable=True)
        ordered = points.gather(1, order)
        own, reach = self.points[:, queries], self.reach[queries]
        if self.size is not None:
            # Once around to either side: a range of neighbours never has a seam.
            ordered = torch.cat([ordered - self.size, ordered, ordered + self.size], dim=1)
        first = torch.searchsorted(ordered, own - reach)
        last = torch.searchsorted(ordered, own + reach, right=True)
        count = (last - first).clamp(max=end)
        steps = torch.arange(int(count.max()) if count.numel() else 0, device=points.device)
        places = (first[..., None] + steps) % end
        keys = order.gather(1, places.flatten(1)).view(places.shape)
        return keys, steps < count[..., None]

    def count(self, unless: Rule | None = None) -> Tensor:
        """Visible keys of every query: int64 ``[draws, n]``; those that `unless` names left out.

        With `unless` there may be more rows than draws, if it tells heads apart.
        """
        parts = []
        for first, last in self.segments():
            widest = int(self.reach[first:last].max()) * 2 + 1
            spread = self.size if self.size is not None else self.seq_len
            width = min(last, 1 + 2 * widest * last // spread)
            rows = max(1, _COUNT_ENTRIES // (width * len(self.points)))
            for low in range(first, last, rows):
                queries = torch.arange(low, min(low + rows, last), device=self.points.device)
                keys, meant = self.candidates(queries, last)
                i = queries[None, :, None]
                seen = meant & (keys <= i)
                if unless is not None:
                    seen = seen & ~unless(i, keys)
                parts.append(seen.sum(-1))
        return torch.cat(parts, dim=1)

    def segments(self) -> list[tuple[int, int]]:
        """Queries ``first .. last - 1`` that may share a search among the keys below `last`.

        Where reaches shrink as positions grow, a search among few keys for early queries, and in
        a narrow range for late ones, keeps the candidates of each within a small factor of what
        it sees: positions from each power of two to the next.
        """
        n = self.seq_len
        if bool((self.reach == self.reach[:1]).all()):
            return [(0, n)] if n else []
        bounds = [0, *(1 << m for m in range(n.bit_length()) if 1 << m < n), n]
        return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


class RingPattern(Pattern):
    """What the patterns on a ring share; each says where its points lie and how far queries reach.

    Fields of a subclass: `window`, `seed`, `per_head` (draw for every query head as well).
    """

    window: int
    seed: int
    per_head: bool

    def __post_init__(self) -> None:
        whole_number(self.window, "window", 1)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserError(f"seed must be a whole number, got {self.seed!r}")
        for flag in ("circular", "per_head"):
            if not isinstance(getattr(self, flag, False), bool):
                raise UserError(f"{flag} must be true or false, got {getattr(self, flag)!r}")

    @abstractmethod
    def ring(
        self, seq_len: int, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Ring:
        """The points and reaches of a sequence of `seq_len` tokens."""

    @abstractmethod
    def keys(self, seq_len: int, layers: range, heads: int) -> list[int]:
        """What the points of every layer and draw are hashed with, layer after layer."""

    @abstractmethod
    def pair_probability(self, seq_len: int) -> Tensor:
        """P(query i sees a given earlier key): float64, ``[seq_len]`` or one for all queries."""

    def draws(self, heads: int) -> list[int | None]:
        """The head coordinate of every draw of points that `heads` query heads use."""
        return list(range(heads)) if self.per_head else [None]

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
        return self.ring(seq_len, layer, heads, query_positions.device).visible(query_positions)

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        return self.ring(seq_len, layer, heads, device).rule()

    def profile(self, seq_len: int) -> Profile:
        return Profile(0, 1, self.pair_probability(seq_len).expand(seq_len))

    def keys_per_query(self, seq_len: int) -> Tensor:
        return 1 + torch.arange(seq_len) * self.pair_probability(seq_len)

    @property
    def effective_window(self) -> int | None:
        return self.window

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        if self.saturated(seq_len):
            return torch.arange(1, seq_len + 1).expand(len(self.draws(heads)), seq_len)
        return self.count_visible_except(None, seq_len, layer=layer, heads=heads)

    def count_visible_except(
        self, unless: Rule | None, seq_len: int, *, layer: int = 0, heads: int = 1
    ) -> Tensor:
        return self.ring(seq_len, layer, heads).count(unless)
