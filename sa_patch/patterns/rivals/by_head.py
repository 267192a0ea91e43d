"""A pattern for each KV head, as in DuoAttention (2410.10819)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Composed, Pattern, Rule, View


@dataclass(frozen=True)
class ByHead(Composed):
    """The query heads of each KV head see what that head's own pattern shows.

    DuoAttention leaves heads that retrieve at full attention, and gives all others sinks and a
    window (arXiv 2410.10819); any patterns can be mixed so. Its text form counts heads:
    ``heads{1*full|2*sinks:4+swa:252}`` for three KV heads. Which heads are which differs from layer
    to layer: `patch_model` takes a pattern for each layer.

    Args:
        patterns: one for each KV head of a layer.

    Raises:
        UserError: if they are not patterns, draw for every head, or differ by head themselves.
    """

    patterns: tuple[Pattern, ...]

    name: ClassVar[str] = "heads"
    per_head: ClassVar[bool] = True
    summary: ClassVar[str] = "a pattern for each KV head (DuoAttention, 2410.10819)"

    def __post_init__(self) -> None:
        given = self.patterns if isinstance(self.patterns, tuple) else ()
        if not given or not all(isinstance(own, Pattern) for own in given):
            raise UserError(
                "give a pattern for each KV head, for example heads{1*full|2*sinks:4+swa:252}"
            )
        for own in given:
            parts = getattr(own, "parts", (own,))
            if any(isinstance(part, ByHead) or getattr(part, "per_head", False) for part in parts):
                raise UserError(f"a head's own pattern must be the same for all heads, not {own}")

    @property
    def members(self) -> tuple[Pattern, ...]:
        return self.patterns

    @property
    def scores_all(self) -> bool:  # type: ignore[override]
        """Whether all do."""
        return all(own.scores_all for own in self.patterns)

    @property
    def counts_need_content(self) -> bool:
        return any(own.counts_need_content for own in self.patterns)

    def joined(self, other: Pattern) -> ByHead:
        """What either shows each head."""
        if not isinstance(other, ByHead):
            return ByHead(tuple(own | other for own in self.patterns))
        if len(other.patterns) != len(self.patterns):
            raise UserError(f"{self} and {other} are for different numbers of KV heads")
        pairs = zip(self.patterns, other.patterns, strict=True)
        return ByHead(tuple(one | another for one, another in pairs))

    def each(self, change: Callable[[Pattern], Pattern]) -> ByHead:
        """With something done to the pattern of every head."""
        return ByHead(tuple(change(own) for own in self.patterns))

    def split(
        self, heads: int, q: Tensor | None, k: Tensor | None
    ) -> Iterator[tuple[Pattern, list[int], dict[str, Any]]]:
        """Each pattern once: its query heads, and the `heads`, `q` and `k` of these alone.

        Args:
            heads: query heads in all.
            q, k: ``[.., q_heads or kv_heads, tokens, head_dim]``.

        Raises:
            UserError: if there are not as many KV heads as patterns.
        """
        group, wanted = heads // len(self.patterns), len(self.patterns)
        found = wanted if k is None else k.shape[-3]
        if heads % wanted or found != wanted:
            raise UserError(
                f"{self} is for {wanted} KV heads, and here are {heads} query heads"
                + (f" with {found} KV heads" if found != wanted else "")
                + "; give as many patterns as a layer has KV heads"
            )
        ruled: dict[Pattern, list[int]] = {}
        for kv_head, own in enumerate(self.patterns):
            ruled.setdefault(own, []).append(kv_head)
        for own, kv_heads in ruled.items():
            mine = [head * group + step for head in kv_heads for step in range(group)]
            content = {
                "q": None if q is None else take_heads(q, mine, -3),
                "k": None if k is None else take_heads(k, kv_heads, -3),
            }
            yield own, mine, {"heads": len(mine), **content}

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
        heads = max(heads, len(self.patterns)) if q is None else len(q)
        told = []
        for own, mine, content in self.split(heads, q, k):
            if self.looks_ahead and content["q"] is not None:
                content["q"] = own.queries_read(content["q"], query_positions)
            told.append((mine, own.visible(query_positions, seq_len, layer=layer, **content)))
        return _in_order(told)

    def view(self, seq_len: int, **given: Any) -> View:
        q, k, heads = (given.pop(name, None) for name in ("q", "k", "heads"))
        heads = max(heads or 1, len(self.patterns)) if q is None else len(q)
        views = [
            (mine, own.view(seq_len, **content, **given))
            for own, mine, content in self.split(heads, q, k)
        ]
        return lambda low, high: _in_order([(mine, view(low, high)) for mine, view in views])

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        raise TypeError(f"{self} differs by head")

    def keys_per_query(self, seq_len: int) -> Tensor:
        """A mean over the heads."""
        return self._mean(lambda own: own.keys_per_query(seq_len))

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        return self._mean(lambda own: own.selection_dots(seq_len, group))

    def dense_end(self, seq_len: int) -> int:
        return min(own.dense_end(seq_len) for own in self.patterns)

    def means_read(self, positions: Tensor) -> int:
        return round(sum(own.means_read(positions) for own in self.patterns) / len(self.patterns))

    def _mean(self, ask: Callable[[Pattern], Tensor]) -> Tensor:
        return reduce(torch.add, map(ask, self.patterns)) / len(self.patterns)

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        heads = max(heads, len(self.patterns))
        rows = [
            (mine, own.count_visible(seq_len, layer=layer))
            for own, mine, _ in self.split(heads, None, None)
        ]
        return _in_order(rows)

    def saturated(self, seq_len: int) -> bool:
        return all(own.saturated(seq_len) for own in self.patterns)

    @property
    def effective_window(self) -> int | None:
        """The widest of the heads'; None where one has no limit."""
        windows = [own.effective_window for own in self.patterns]
        known = [window for window in windows if window is not None]
        return max(known) if len(known) == len(windows) else None

    def text(self, of: Callable[[Pattern], str]) -> str:
        """A text form with those that `of` gives the patterns."""
        runs = ((of(own), len(list(same))) for own, same in groupby(self.patterns))
        return f"{self.name}{{{'|'.join(f'{count}*{own}' for own, count in runs)}}}"

    def __str__(self) -> str:
        return self.text(str)


def _in_order(told: list[tuple[list[int], Tensor]]) -> Tensor:
    """What was told of some heads each, ``[heads of these or 1, ...]``, for all of them."""
    rows = [x.expand(len(mine), *x.shape[1:]) for mine, x in told]
    return in_order(rows, [head for mine, _ in told for head in mine], 0)


def take_heads(x: Tensor, heads: Sequence[int], dim: int) -> Tensor:
    """Some of the heads along a dimension; a view where they follow each other.

    Slices, because a list as an index is copied to the device, which waits for it.
    """
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    parts = [x.narrow(dim, run[0], len(run)) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def in_order(parts: list[Tensor], heads: Sequence[int], dim: int) -> Tensor:
    """All heads from the first to the last, from parts that hold `heads` one after the other."""
    places = sorted(range(len(heads)), key=heads.__getitem__)
    return take_heads(torch.cat(parts, dim), places, dim)
