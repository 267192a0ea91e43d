"""Which layers to leave full when only so many may be: by measurement, and by rules of thumb."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sa_patch.errors import UserError


def most_harmed(rises: Mapping[int, float], budget: int) -> list[int]:
    """The `budget` layers whose loss rises most when they go sparse; of equal ones the first."""
    ranked = sorted(rises, key=lambda layer: (-rises[layer], layer))
    return sorted(ranked[:budget])


def every_kth(layers: Sequence[int], budget: int) -> list[int]:
    """Layers at even distances, the middles of `budget` equal parts of the stack."""
    return [layers[int((2 * part + 1) * len(layers) / (2 * budget))] for part in range(budget)]


def first(layers: Sequence[int], budget: int) -> list[int]:
    """The layers nearest the input."""
    return list(layers[:budget])


def last(layers: Sequence[int], budget: int) -> list[int]:
    """The layers nearest the output."""
    return list(layers[len(layers) - budget :])


def ends(layers: Sequence[int], budget: int) -> list[int]:
    """Half of them at either end, the odd one at the input."""
    return first(layers, budget - budget // 2) + last(layers, budget // 2)


RIVALS: Mapping[str, Callable[[Sequence[int], int], list[int]]] = {
    "every k-th": every_kth,
    "first": first,
    "last": last,
    "first and last": ends,
}
"""Rules that need no measurement, by name: full layers from all candidates and a budget."""


def check_budget(budget: int | None, candidates: Sequence[int]) -> int:
    """The number of full layers, by default one in five.

    Raises:
        UserError: if none would be left sparse.
    """
    if budget is None:
        return max(1, len(candidates) // 5) if len(candidates) > 1 else 0
    if budget < 0 or budget >= len(candidates):
        raise UserError(
            f"--full-layers must leave at least one of {len(candidates)} layers sparse, so it is "
            f"a whole number from 0 to {len(candidates) - 1}; got {budget}"
        )
    return budget
