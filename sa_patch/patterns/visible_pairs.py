"""The visible pairs of a pattern as lists, from closed forms: O(n w) memory, and no n x n mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern
from sa_patch.patterns.full import Full
from sa_patch.patterns.ring import Ring, RingPattern
from sa_patch.patterns.rivals.by_head import ByHead
from sa_patch.patterns.sinks import Sinks
from sa_patch.patterns.sliding_window import SWA
from sa_patch.patterns.stochastic import SA
from sa_patch.patterns.tail import Tail
from sa_patch.patterns.union import parts_of

# Visible or candidate pairs that are held as int64 at once while a list is built.
CHUNK_PAIRS = 1 << 22

Rows = Iterator[tuple[Tensor, Tensor]]
"""Chunks of queries in order: keys per query int64 ``[rows]``, and the keys one after another."""


def has_two_sides(pattern: Pattern) -> bool:
    """Whether a pattern has a form without causality."""
    parts = parts_of(pattern)
    return all(isinstance(part, (Full, SWA, SA)) for part in parts)


def check_pairs(pattern: Pattern, causal: bool = True) -> None:
    """Raise `UserError` for a pattern whose pairs `visible_pairs` cannot list."""
    if pattern.reads_content:
        raise UserError(f"{pattern} chooses its keys by content, so its pairs cannot be listed")
    if isinstance(pattern, ByHead):
        raise UserError(
            f"{pattern} differs from head to head, so it has no one list of pairs; give a pattern "
            "that is the same for all heads"
        )
    if not causal and not has_two_sides(pattern):
        raise UserError(
            f"{pattern} has no non-causal form; full, swa, sa and unions of them have one"
        )


def expected_pairs(pattern: Pattern, seq_len: int, *, causal: bool = True) -> float:
    """Expected number of visible pairs of a layer, in closed form."""
    pairs = float(pattern.keys_per_query(seq_len).sum())
    # Dropping causality mirrors every pair but those of a token with itself.
    return pairs if causal else 2 * pairs - seq_len


def draws_of(pattern: Pattern, heads: int) -> int:
    """Visible sets of a layer that differ: one, or one for each of the query heads."""
    parts = parts_of(pattern)
    own = any(isinstance(part, RingPattern) and part.per_head for part in parts)
    return heads if own else 1


def visible_pairs(
    pattern: Pattern, seq_len: int, *, layer: int = 0, head: int = 0, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """All pairs of a query and a key it sees, each once, by query and then by key.

    Args:
        seq_len: number of tokens n.
        layer: index of the layer, for patterns drawn anew in each layer.
        head: query head, for patterns drawn anew for each.
        causal: False for the two-sided forms of full attention, SWA, SA and their unions.

    Returns:
        Queries and keys, int64 ``[pairs]`` each.

    Raises:
        UserError: for a pattern that chooses by content, gives each head a pattern of its own, or
            has no form without causality.
    """
    check_pairs(pattern, causal)
    parts = parts_of(pattern)
    codes = []
    for part in parts:
        low = 0
        for counts, keys in pair_rows(part, seq_len, layer=layer, head=head, causal=causal):
            queries = torch.arange(low, low + len(counts)).repeat_interleave(counts)
            codes.append(queries * seq_len + keys)
            low += len(counts)
    whole = torch.cat(codes) if codes else torch.zeros(0, dtype=torch.int64)
    # Parts of a union may show the same key; a query's keys in order are read faster, too.
    whole = whole.unique(sorted=True)
    return whole // max(seq_len, 1), whole % max(seq_len, 1)


def pair_rows(
    pattern: Pattern, seq_len: int, *, layer: int = 0, head: int = 0, causal: bool = True
) -> Rows:
    """The keys of every query of one pattern that is no union and reads no content."""
    if isinstance(pattern, RingPattern):
        yield from _ring_rows(pattern, seq_len, layer, head, causal)
        return
    for queries in query_chunks(pattern, seq_len, causal=causal):
        ranges = visible_ranges(pattern, queries, seq_len, causal=causal)
        if ranges is not None:
            yield spread(*ranges)
        else:
            yield from _defined_rows(pattern, queries, seq_len, layer)


def query_chunks(pattern: Pattern, seq_len: int, *, causal: bool = True) -> Iterator[Tensor]:
    """All positions in order, so many at a time as show about `CHUNK_PAIRS` keys at most.

    Tiles of queries that share their choices stay whole.
    """
    widest = max(1, int(expected_pairs(pattern, seq_len, causal=causal)) // max(seq_len, 1))
    shared = pattern.shared_queries
    rows = max(1, CHUNK_PAIRS // (4 * widest) // shared) * shared
    for first in range(0, seq_len, rows):
        yield torch.arange(first, min(first + rows, seq_len))


def visible_ranges(
    pattern: Pattern, queries: Tensor, seq_len: int, *, causal: bool = True
) -> tuple[Tensor, Tensor] | None:
    """The keys that each query sees, as ranges that do not overlap.

    Args:
        queries: int64 ``[m]``, positions.
        causal: False for the non-causal forms of full attention and the sliding window.

    Returns:
        First keys and ends (the key after the last), int64 ``[m, ranges]`` each; a range that does
        not end after its first key is empty. None for a pattern that is not known here.
    """
    after = queries + 1
    if isinstance(pattern, Full):
        return _one(torch.zeros_like(queries), after if causal else after * 0 + seq_len)
    if isinstance(pattern, SWA):
        ahead = after if causal else queries + pattern.window
        return _one((after - pattern.window).clamp(min=0), ahead.clamp(max=seq_len))
    if isinstance(pattern, Sinks):
        return _one(torch.zeros_like(queries), after.clamp(max=pattern.size))
    if isinstance(pattern, Tail):
        return _one(queries.where(queries < seq_len - pattern.size, 0), after)
    return None


def _one(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    return first[:, None], end[:, None]


def spread(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and keys of ranges ``first .. end - 1``, int64 ``[rows, ranges]``; some are empty."""
    length = (end - first).clamp(min=0)
    flat = length.flatten()
    stop = flat.cumsum(0)
    steps = torch.arange(int(stop[-1])) - (stop - flat).repeat_interleave(flat)
    keys = first.flatten().repeat_interleave(flat) + steps
    return length.sum(-1), keys


def _ring_rows(pattern: RingPattern, seq_len: int, layer: int, head: int, causal: bool) -> Rows:
    ring = pattern.ring(seq_len, layer, head + 1 if pattern.per_head else 1)
    # The head's own draw, the last one.
    ring = Ring(ring.points[-1:], ring.reach, ring.size)
    circumference = ring.size if ring.size is not None else seq_len
    for first, last in ring.segments():
        end = last if causal else seq_len
        width = min(end, 1 + 4 * int(ring.reach[first:last].max()) * end // circumference)
        rows = max(1, CHUNK_PAIRS // width)
        for low in range(first, last, rows):
            queries = torch.arange(low, min(low + rows, last))
            keys, meant = ring.candidates(queries, end)
            seen = meant[0] & (keys[0] <= queries[:, None]) if causal else meant[0]
            yield seen.sum(-1), keys[0][seen]


def _defined_rows(pattern: Pattern, queries: Tensor, seq_len: int, layer: int) -> Rows:
    """By the pattern's definition, a dense mask of few rows at a time: any pattern, O(n^2) time."""
    for some in queries.split(max(1, CHUNK_PAIRS // seq_len)):
        mask = pattern.visible(some, seq_len, layer=layer)[0]
        yield mask.sum(-1), mask.nonzero()[:, 1]
