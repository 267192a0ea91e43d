"""Recovery of one task, how much of full attention's quality is kept, and its paired bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
# A full score this close to chance leaves nothing to recover.
LEAST_ABOVE_CHANCE = 0.05


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


def recovered(ours: float, theirs: float, language: bool, chance: float = 0.0) -> float:
    """``NLL(full) / NLL(pattern)`` of language, else ``(score - chance) / (full - chance)``.

    Args:
        ours, theirs: mean scores of the pattern and of full attention; log-likelihoods of a token
            where `language`.
        chance: score of guessing.
    """
    return theirs / ours if language else (ours - chance) / (theirs - chance)


def bootstrap(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    language: bool,
    chance: float,
    task: str,
    draws: int = DRAWS,
) -> tuple[float, NDArray[np.float64]]:
    """Recovery of ``ours [seeds, items]`` against ``theirs [items]``, and its bootstrap.

    Seeds stand in one order for all tasks.
    """
    # Seeded by the task alone, so that every pattern meets the same items in the same draw.
    generator = np.random.default_rng(list(task.encode()))
    items = generator.integers(0, len(theirs), (draws, len(theirs)))
    # A seed's luck is the same in every task, so that a draw takes the same seeds in all of them.
    seeds = np.random.default_rng(0).integers(0, len(ours), (draws, len(ours)))
    mine = np.stack(
        [ours[rows][:, columns].mean() for rows, columns in zip(seeds, items, strict=True)]
    )
    reference = theirs[items].mean(axis=1)
    value = recovered(float(ours.mean()), float(theirs.mean()), language, chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        if language:
            return value, reference / mine
        above = np.maximum(reference - chance, LEAST_ABOVE_CHANCE)
        # (mine - chance) / above, in a form that stays 1 for equal scores where `above` is floored.
        return value, 1 - (reference - mine) / above


def interval(value: float, samples: NDArray[np.float64]) -> Interval:
    """The value with the middle 95% of its bootstrap."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(value, float(low), float(high))
