"""How much of full attention's quality a pattern keeps, at what cost, with paired intervals.

**Groups.** Language modelling: perplexity tasks, recovery ``NLL(full) / NLL(pattern)`` per token.
Every other task: ``(score - chance) / (full - chance)``; tasks whose name ends in a length are
retrieval (or whatever was generated at that length), the rest benchmarks. A group's recovery is the
mean over its tasks, a point's the mean over its groups.

**Points.** One pattern (its seeds averaged) at one length n: the tasks of that length, and the
benchmarks run with the very same pattern, whatever their prompts' lengths. Benchmarks join the one
length that shares most patterns with them: a pattern may fit the budgets of other lengths too.

**Intervals.** Paired bootstrap: items are drawn with replacement, the same ones for full attention
and for every pattern, and the seeds of random patterns likewise; 95% percentile intervals. A rival
is beaten where the interval of the difference excludes zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa_patch.errors import UserError
from sa_patch.evaluation.recovery import (
    DRAWS,
    LEAST_ABOVE_CHANCE,
    Interval,
    bootstrap,
    interval,
)
from sa_patch.files.settings import read_fraction
from sa_patch.report.recovery_items import (
    GROUPS,
    LANGUAGE,
    group_of,
    items_of,
    length_of,
    read_items,
)
from sa_patch.sweep.results import Cell, Run

# A budget point holds what spends at most this much more than its share: prompts vary in length.
_OVER = 1.03


@dataclass(frozen=True)
class Recovered:
    """One point: a pattern at a length.

    ``groups`` and ``tasks`` hold recoveries, ``mean`` that over the groups; ``draws`` are the
    bootstrap's means, paired with those of other points of the same length and tasks.
    """

    pattern: str
    layers: str
    n: int
    budget: float | None
    share: float
    visited: float | None
    mean_keys: float
    seeds: int
    groups: Mapping[str, Interval]
    tasks: Mapping[str, float]
    mean: Interval
    draws: NDArray[np.float64]


def recover(
    runs: Iterable[Run], budgets: Sequence[float], draws: int = DRAWS, by: str = "flops"
) -> list[Recovered]:
    """Every point of some runs, best first within each length and budget.

    Args:
        budgets: shares of full attention's FLOPs, ascending; a point belongs to the smallest that
            it does not exceed by more than 3%.
        by: "flops", or "visited" for budgets in what tiles of queries read.

    A point where full attention itself is at chance in every task is left out.

    Raises:
        UserError: if full attention is missing for a task, items do not match, a run did not
            count visited keys and budgets are in them, or no point is found.
    """
    cells = read_items(runs)
    full = {
        task: of_task
        for (name, _), by in cells.items()
        if name == "full"
        for task, of_task in by.items()
    }
    if not full:
        raise UserError("recovery needs full attention in the sweep: add 'full' to its methods")
    lengths = sorted({n for task in full if (n := length_of(task)) is not None})
    at_home = _length_of_benchmarks(cells, lengths)
    points = []
    for n in lengths:
        for (pattern, layers), by_task in cells.items():
            own = [task for task in by_task if length_of(task) == n]
            if pattern == "full" or not own:
                continue
            tasks = own
            if n == at_home:
                tasks = own + [task for task in by_task if length_of(task) is None]
            missing = [task for task in tasks if task not in full]
            if missing:
                raise UserError(f"full attention has no result for {', '.join(missing)} yet")
            point = _point(pattern, layers, n, own, tasks, by_task, full, draws)
            if point is not None:
                points.append(dataclasses.replace(point, budget=_budget(point, budgets, by)))
    if not points:
        raise UserError(
            "recovery needs a pattern beside full attention, on a task whose name ends in a length "
            "(recall_passkey_4096) and in which full attention is above chance"
        )
    return sorted(points, key=lambda p: (p.n, p.budget or 1.0, -p.mean.value))


def _length_of_benchmarks(
    cells: Mapping[tuple[str, str], Mapping[str, object]], lengths: Sequence[int]
) -> int | None:
    """The length that shares most patterns with the benchmarks, the longest of equals."""

    def shared(n: int) -> int:
        return sum(
            name != "full" and {n, None} <= {length_of(task) for task in by_task}
            for (name, _), by_task in cells.items()
        )

    return max(lengths, key=lambda n: (shared(n), n), default=None)


def _point(
    pattern: str,
    layers: str,
    n: int,
    own: Sequence[str],
    tasks: Sequence[str],
    by_task: Mapping[str, Sequence[tuple[Cell, Any]]],
    full: Mapping[str, Sequence[tuple[Cell, Any]]],
    draws: int,
) -> Recovered | None:
    values: dict[str, list[float]] = {}
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    by_name = {}
    spent = [items_of(by_task[task]) for task in own]
    for task in tasks:
        cell = full[task][0][0]
        ours, theirs = items_of(by_task[task]), items_of(full[task])
        if ours.scores.shape[1] != theirs.scores.shape[1]:
            raise UserError(
                f"{pattern} and full attention were run on different numbers of items of {task}; "
                "run both with one --limit"
            )
        group = group_of(task, cell.metric)
        chance = cell.chance or 0.0
        if group != LANGUAGE and theirs.scores.mean() - chance < LEAST_ABOVE_CHANCE:
            continue
        value, samples = bootstrap(
            ours.scores, theirs.scores[0], group == LANGUAGE, chance, task, draws
        )
        values.setdefault(group, []).append(value)
        drawn.setdefault(group, []).append(samples)
        by_name[task] = value
    if not by_name:
        return None
    groups = {
        group: interval(float(np.mean(values[group])), np.mean(drawn[group], axis=0))
        for group in GROUPS
        if group in values
    }
    samples = np.mean([np.mean(drawn[group], axis=0) for group in groups], axis=0)
    mean = float(np.mean([found.value for found in groups.values()]))
    share = float(np.mean([items.share for items in spent]))
    visited = [items.visited for items in spent if items.visited is not None]
    return Recovered(
        pattern=pattern,
        layers=layers,
        n=n,
        budget=None,
        share=share,
        visited=float(np.mean(visited)) if visited else None,
        mean_keys=float(np.mean([items.mean_keys for items in spent])),
        seeds=max(len(items.scores) for items in spent),
        groups=groups,
        tasks=by_name,
        mean=interval(mean, samples),
        draws=samples,
    )


def _budget(point: Recovered, budgets: Sequence[float], by: str) -> float | None:
    """The smallest budget that a point does not exceed by more than `_OVER` allows."""
    share = point.share if by == "flops" else point.visited
    if share is None:
        raise UserError(
            f"what a tile reads was not counted for {point.pattern} at n = {point.n}; count it "
            "with scripts/count_visited, or leave --by visited out"
        )
    return next((budget for budget in budgets if share <= budget * _OVER), None)


def difference(one: Recovered, other: Recovered) -> Interval:
    """By how much one point recovers more than another of the same tasks, paired."""
    return interval(one.mean.value - other.mean.value, one.draws - other.draws)


def parse_budgets(text: str) -> list[float]:
    """Shares from text such as ``0.0625,1/8``, ascending.

    Raises:
        UserError: if one is no number above 0 and at most 1.
    """
    budgets = []
    for piece in text.split(","):
        share = read_fraction(piece)
        if not 0 < share <= 1:
            raise UserError(
                f"budgets are shares of full attention's cost, such as 0.0625,1/8; got {piece!r}"
            )
        budgets.append(share)
    return sorted(budgets)
