"""The one mask of all patterns, written in operations that torch and CuTe share.

What is compiled in is its structure; windows, seeds, lengths and block sizes are read from tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sa_patch.kernels.plans.tables import ENTRY, Structure

Index = Any
"""Integers of torch or of CuTe."""
Read = Callable[[Index], Index]
"""What stands at an index."""


def visible(
    structure: Structure,
    number: Callable[[int], Index],
    load: Read,
    integer: Read,
    batch: Index,
    head: Index,
    i: Index,
    j: Index,
) -> Index:
    """Whether the query in place i sees the key in place j.

    Args:
        structure: of a `Plan`.
        number: one of its numbers.
        load: reads its tables.
        integer: makes 0 and 1 of a truth value.
        batch, head, i, j: integers that broadcast against each other.
    """
    ring_entries = [ENTRY * (1 + ring) for ring in range(len(structure.rings))]
    choice_entries = [ENTRY * (1 + len(ring_entries) + n) for n in range(len(structure.choices))]

    def at(entry: int, place: Index) -> Index:
        begin = number(entry) + place
        return load(begin + number(entry + 1) * head if structure.per_head else begin)

    def within_reach(ring: int) -> Index:
        distance = at(ring, i) - at(ring + 2, j)
        reach = at(ring + 4, i)
        far = number(ring + 6) - reach
        near = (distance <= reach) & (distance + reach >= 0)
        return near | (distance >= far) | (distance + far <= 0)

    def in_chosen_block(choice: int, halvings: int) -> Index:
        """Whether the last chosen block that does not begin behind the key holds it."""
        start, of_draw, choosers, each, queries, size = (number(choice + n) for n in range(6))
        place = start + of_draw * (choosers * batch + head // each) + i + 0 * j
        for bit in reversed(range(halvings)):
            # A choice between two places would double what is compiled, here and below.
            step = queries * (1 << bit)
            place = place + step * integer(load(place + step) <= key)
        step = key - load(place)
        return (step >= 0) & (step < size)

    query, key = (at(0, i), at(2, j)) if structure.ordered else (i + number(7), j)
    shown: list[Index] = []
    hidden: list[Index] = []
    if structure.local:
        local = (key < number(6)) | (key >= at(4, i))
        (shown if structure.local > 0 else hidden).append(local)
    for ring, seen in zip(ring_entries, structure.rings, strict=True):
        (shown if seen else hidden).append(within_reach(ring))
    for choice, (seen, halvings) in zip(choice_entries, structure.choices, strict=True):
        (shown if seen else hidden).append(in_chosen_block(choice, halvings))
    causal = key <= query
    # A pattern that shows nothing sees no key before the first.
    seen = (key < 0) & causal
    for one in shown:
        seen = seen | (one & causal)
    for one in hidden:
        seen = seen & (integer(one) < 1)
    return seen


def mask_function(
    tables: Tensor, structure: Structure
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """``visible(batch, head, i, j)`` in torch."""

    def number(place: int) -> Tensor:
        return tables[place]

    def load(index: Tensor) -> Tensor:
        return tables[index.long()]

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found: Tensor = visible(structure, number, load, lambda truth: truth * 1, batch, head, i, j)
        return found

    return seen
