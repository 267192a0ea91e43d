"""The seeds of patterns and unions: one number for all that is drawn."""

from __future__ import annotations

import dataclasses
from typing import Any

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern
from sa_patch.patterns.rivals.by_head import ByHead
from sa_patch.patterns.union.union import parts_of, unite

# Distance of seeds of parts that are drawn beside each other: hashes take it as another word.
_STRIDE = 1 << 32


def seed_of(pattern: Pattern) -> int | None:
    """The seed of a pattern, of a union that of its first random part; None without one."""
    drawn = _drawn_parts(pattern)
    return drawn[0].seed if drawn else None


def with_seed(pattern: Pattern, seed: int) -> Pattern:
    """The same pattern with another seed; of a union, that of its first random part.

    Parts that shared a seed share one again. Where parts of one kind have several, in their order
    ``s, t, ...``, those after the first become multiples of 2^32 above it, so that two draws stay
    two, and what one seed draws no other seed less than 2^32 away does: SA of the seeds 0 and 1
    take 9 as 9 and 9 + 2^32. Kinds keep their distance, since an SA and a PSA of one seed share
    nothing. So ``with_seed(p, seed_of(p))`` is p unless parts of one kind have other seeds than
    these, and ``with_seed(with_seed(p, a), b)`` is ``with_seed(p, b)``.

    Raises:
        UserError: if it draws nothing at random.
    """
    drawn = _drawn_parts(pattern)
    if not drawn:
        raise UserError(f"{pattern} draws nothing at random, so it takes no seed")
    given: dict[type[Pattern], list[int]] = {}
    for part in drawn:
        seeds = given.setdefault(type(part), [])
        if part.seed not in seeds:
            seeds.append(part.seed)

    def drawn_anew(part: Any) -> Pattern:
        if part not in drawn:
            return part
        seeds = given[type(part)]
        first = seeds[0] - drawn[0].seed + seed
        return dataclasses.replace(part, seed=first + _STRIDE * seeds.index(part.seed))

    def changed(own: Pattern) -> Pattern:
        return unite(*map(drawn_anew, parts_of(own)))

    return pattern.each(changed) if isinstance(pattern, ByHead) else changed(pattern)


def _drawn_parts(pattern: Pattern) -> list[Any]:
    """The parts that have a seed, of all heads, in order."""
    of_heads = pattern.patterns if isinstance(pattern, ByHead) else (pattern,)
    parts = [part for own in of_heads for part in parts_of(own)]
    return [part for part in parts if hasattr(part, "seed")]
