"""Unions: several patterns under one softmax, each key counted once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Composed, Pattern, Profile, Rule, View
from sa_patch.patterns.full import Full
from sa_patch.patterns.prefix_stable import PSA
from sa_patch.patterns.rivals.by_head import ByHead
from sa_patch.patterns.sinks import Sinks
from sa_patch.patterns.sliding_window import SWA
from sa_patch.patterns.stochastic import SA
from sa_patch.patterns.tail import Tail

# Of parts that differ in this number alone, the larger shows what the smaller does. Rings of one
# draw are among them: the same points, and a reach that grows with the window.
_NESTED: dict[type[Pattern], str] = {
    **{Sinks: "size", SWA: "window", Tail: "size"},
    **{SA: "window", PSA: "window"},
}


def unite(*patterns: Pattern) -> Pattern:
    """The pattern of the keys that any of these sees.

    Unions are flattened; of several sinks, windows or tails, and of several SA or PSA that share a
    draw, the largest stays, of equal parts one; full attention swallows the rest. What is left
    stands in one order, so that equal unions are equal objects. What differs by head is united
    head by head.

    Raises:
        UserError: for no pattern at all.
    """
    by_head = next((pattern for pattern in patterns if isinstance(pattern, ByHead)), None)
    if by_head is not None:
        others = [pattern for pattern in patterns if pattern is not by_head]
        return reduce(ByHead.joined, others, by_head)
    parts = _merged(part for pattern in patterns for part in parts_of(pattern))
    if not parts:
        raise UserError("a union needs at least one pattern, for example sinks:4+swa:60")
    return parts[0] if len(parts) == 1 else Union(parts)


def _merged(parts: Iterable[Pattern]) -> tuple[Pattern, ...]:
    """What is left of the parts of a union, in order."""
    merged: dict[Pattern, Pattern] = {}
    for part in parts:
        if isinstance(part, Full):
            return (part,)
        number = _NESTED.get(type(part))
        alike = part if number is None else dataclasses.replace(part, **{number: 1})
        largest = merged.get(alike, part)
        if number is not None and getattr(part, number) > getattr(largest, number):
            largest = part
        merged[alike] = largest
    left = merged.values()
    return tuple(sorted((part for part in left if not _within_ring(part, left)), key=_place))


def _within_ring(part: Pattern, others: Iterable[Pattern]) -> bool:
    """Whether another shows around the ring of one draw all that this shows along its line."""
    return isinstance(part, SA) and any(
        isinstance(other, SA)
        and other.window >= part.window
        and (other.circular, part.circular) == (True, False)
        and (other.seed, other.per_head) == (part.seed, part.per_head)
        for other in others
    )


def parts_of(pattern: Pattern) -> tuple[Pattern, ...]:
    """The parts of a union; of any other pattern itself alone."""
    return pattern.parts if isinstance(pattern, Union) else (pattern,)


def _place(pattern: Pattern) -> tuple[bool, int, int, str]:
    """Cheap and certain parts first, those that choose by content last; draws by their seeds."""
    order = (Sinks, SWA, Tail, SA, PSA)
    known = order.index(type(pattern)) if type(pattern) in order else len(order)
    return pattern.reads_content, known, getattr(pattern, "seed", 0), str(pattern)


@dataclass(frozen=True)
class Union(Composed):
    """Query i sees the keys that any of the parts shows it. Made by ``A | B`` or by `unite`.

    Args:
        parts: at least two patterns, as `unite` leaves them.

    Raises:
        UserError: if the parts are not of that form.
    """

    parts: tuple[Pattern, ...]

    name: ClassVar[str] = "union"
    summary: ClassVar[str] = "several patterns under one softmax, such as sinks:4+swa:60+sa:64"

    def __post_init__(self) -> None:
        parts = self.parts if isinstance(self.parts, tuple) else ()
        plain = len(parts) > 1 and all(
            isinstance(part, Pattern) and not isinstance(part, Union) for part in parts
        )
        # Parts that could be joined would be counted twice.
        if not plain or _merged(parts) != parts:
            raise UserError("make a union with |, for example Sinks(4) | SWA(60) | SA(64)")

    @property
    def members(self) -> tuple[Pattern, ...]:
        return self.parts

    @property
    def scores_all(self) -> bool:  # type: ignore[override]
        """Whether a part does: what the others show is then scored, too."""
        return any(part.scores_all for part in self.parts)

    @property
    def counts_need_content(self) -> bool:
        return self.reads_content

    @property
    def computed_as(self) -> Pattern:
        return _computed_as(self)

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
        some = q[:, query_positions] if self.looks_ahead and q is not None else q
        masks = (
            part.visible(
                query_positions,
                seq_len,
                layer=layer,
                heads=heads,
                q=q if part.looks_ahead else some,
                k=k,
            )
            for part in self.parts
        )
        return reduce(torch.logical_or, masks)

    def view(self, seq_len: int, **content: Any) -> View:
        views = [part.view(seq_len, **content) for part in self.parts]
        return lambda low, high: reduce(torch.logical_or, (view(low, high) for view in views))

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        return _any_of(
            [part.rule(seq_len, layer=layer, heads=heads, device=device) for part in self.parts]
        )

    @property
    def has_rule(self) -> bool:
        return all(part.has_rule for part in self.parts)

    def profile(self, seq_len: int) -> Profile:
        parts = [part.profile(seq_len) for part in self.parts]
        hidden = reduce(torch.mul, (1 - part.chance for part in parts))
        return Profile(
            max(part.sinks for part in parts), max(part.window for part in parts), 1 - hidden
        )

    def keys_per_query(self, seq_len: int) -> Tensor:
        """Expected number of visible keys, the parts being drawn independently.

        All are, but SA along a line beside a narrower ring of the same draw, which shows fewer.
        For parts that choose by content: as if they chose at random.
        """
        sinks, window, chance = self.profile(seq_len)
        before = torch.arange(1, seq_len + 1, dtype=torch.float64)
        certain = before.clamp(max=sinks + window)
        return certain + (before - certain) * chance

    def saturated(self, seq_len: int) -> bool:
        return _saturated(self, seq_len)

    @property
    def effective_window(self) -> int | None:
        windows = [part.effective_window for part in self.parts]
        return None if None in windows else sum(window or 0 for window in windows)

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        """Measured number of visible keys of each query: int64 ``[heads or 1, seq_len]``.

        Raises:
            UserError: if a part chooses by content: which keys coincide is then only known where
                the choice is made.
        """
        if self.reads_content:
            raise UserError(f"what {self} sees can only be counted where its blocks are chosen")
        before_last = self.parts[:-1]
        if not all(part.has_rule for part in before_last):
            return self.count_visible_except(None, seq_len, layer=layer, heads=heads)
        rules = [part.rule(seq_len, layer=layer, heads=heads) for part in before_last]
        counts = [
            part.count_visible_except(
                _any_of(rules[:place]) if place else None, seq_len, layer=layer, heads=heads
            )
            for place, part in enumerate(self.parts)
        ]
        return reduce(torch.add, counts)

    def selection_dots(self, seq_len: int, group: int = 1) -> Tensor:
        return reduce(torch.add, (part.selection_dots(seq_len, group) for part in self.parts))

    def dense_end(self, seq_len: int) -> int:
        return max(part.dense_end(seq_len) for part in self.parts)

    def means_read(self, positions: Tensor) -> int:
        return sum(part.means_read(positions) for part in self.parts)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


def _any_of(rules: list[Rule]) -> Rule:
    return lambda i, j: reduce(torch.logical_or, (rule(i, j) for rule in rules))


# Asked in every call.
@lru_cache(maxsize=256)
def _computed_as(union: Union) -> Pattern:
    return unite(*(part.computed_as for part in union.parts))


# Asked several times in every call, and a profile takes time that grows with the sequence.
@lru_cache(maxsize=1024)
def _saturated(union: Union, seq_len: int) -> bool:
    sinks, window, _ = union.profile(seq_len)
    if sinks + window >= seq_len or any(part.saturated(seq_len) for part in union.parts):
        return True
    rest, tail = split_tail(union)
    # Queries before the tail see what they saw if the prompt ended there.
    return bool(tail) and rest.prefix_stable and rest.saturated(seq_len - tail)


# Asked several times in every call.
@lru_cache(maxsize=256)
def split_tail(pattern: Pattern) -> tuple[Pattern, int]:
    """What a pattern shows beside its dense tail, and the tail's size, 0 without one.

    The rest shows every query its own key, as the tail does.
    """
    parts = [part for part in parts_of(pattern) if not isinstance(part, Tail)]
    size = max((part.size for part in parts_of(pattern) if isinstance(part, Tail)), default=0)
    if not size:
        return pattern, 0
    # Sinks alone leave out a later query's own key.
    own = [SWA(1)] if all(isinstance(part, Sinks) for part in parts) else []
    return unite(*parts, *own), size


Pattern._unite = staticmethod(unite)
