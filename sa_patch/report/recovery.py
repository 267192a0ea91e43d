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

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa_patch.errors import UserError
from sa_patch.files.packed import stored_text
from sa_patch.report.series import strip_parameters
from sa_patch.sweep.results import Cell, Run

LANGUAGE, RETRIEVAL, BENCHMARKS = "language modelling", "retrieval", "benchmarks"
GROUPS = (LANGUAGE, RETRIEVAL, BENCHMARKS)
DRAWS = 2000
# A full score this close to chance leaves nothing to recover.
_LEAST_ABOVE_CHANCE = 0.05
# A budget point holds what spends at most this much more than its share: prompts vary in length.
_OVER = 1.03


@dataclass(frozen=True)
class Items:
    """Scores of one pattern on one task.

    Args:
        scores: float64 ``[seeds, items]``; for perplexities mean log-likelihoods of a token.
        share: measured attention FLOPs as a share of full attention's.
        visited: likewise of what tiles of queries read; None for runs that did not count it.
        mean_keys: measured keys per query.
    """

    scores: NDArray[np.float64]
    share: float
    visited: float | None
    mean_keys: float


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recovered:
    """One point: a pattern at a length.

    ``groups`` and ``tasks`` hold recoveries, ``mean`` that over the groups; ``draws`` are the
    bootstrap's means, paired with those of other points of the same length and set of groups.
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


def group_of(task: str, metric: str) -> str:
    """The group that a task belongs to."""
    if "perplexity" in metric:
        return LANGUAGE
    return RETRIEVAL if length_of(task) is not None else BENCHMARKS


def length_of(task: str) -> int | None:
    """The length in a task's name (``passkey_4096``), None without one."""
    found = re.search(r"_(\d{3,})$", task)
    return int(found[1]) if found else None


def read_items(runs: Iterable[Run]) -> dict[tuple[str, str], dict[str, list[tuple[Cell, Any]]]]:
    """Cells with their item scores, by (pattern without seed, layers) and task.

    Raises:
        UserError: if a cell has no item scores.
    """
    found: dict[tuple[str, str], dict[str, list[tuple[Cell, Any]]]] = {}
    for run in runs:
        for cell in run.cells:
            path = run.path / "cells" / f"{cell.id}.json"
            data = json.loads(stored_text(path))
            items = data.get("items")
            if "items" in data and items is None:
                # Its score is no mean of items, such as byte perplexity.
                continue
            if not items:
                raise UserError(
                    f"{path} holds no scores of single items, which paired intervals need; cells "
                    "of earlier versions lack them: run the sweep again in a new folder"
                )
            layers = cell.setting.get("layers")
            key = (
                strip_parameters(cell.setting["pattern"], ("seed",)),
                "all" if layers is None or cell.method == "full" else json.dumps(layers),
            )
            found.setdefault(key, {}).setdefault(cell.task, []).append((cell, items))
    return found


def _items(cells: Sequence[tuple[Cell, Any]]) -> Items:
    """The seeds of one pattern on one task, one row each."""
    rows = []
    for _, items in cells:
        rows.append(np.concatenate([np.asarray(items[name], float) for name in sorted(items)]))
    if len({len(row) for row in rows}) > 1:
        task = cells[0][0].task
        raise UserError(
            f"the seeds of {cells[0][0].setting['pattern']} were run on different numbers of items "
            f"of {task}; finish the sweep, or run all of them with one --limit"
        )
    shares = [cell.flops / cell.full_flops for cell, _ in cells if cell.flops and cell.full_flops]
    keys = [cell.mean_keys for cell, _ in cells if cell.mean_keys is not None]
    visited = [cell.visited_share for cell, _ in cells if cell.visited_share is not None]
    return Items(
        np.stack(rows),
        float(np.mean(shares)),
        float(np.mean(visited)) if visited else None,
        float(np.mean(keys)),
    )


def recover(runs: Iterable[Run], budgets: Sequence[float], draws: int = DRAWS) -> list[Recovered]:
    """Every point of some runs, best first within each length and budget.

    Args:
        budgets: shares of full attention's FLOPs, ascending; a point belongs to the smallest that
            it does not exceed.

    Raises:
        UserError: if full attention is missing for a task, or items do not match.
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
            points.append(_point(pattern, layers, n, own, tasks, by_task, full, budgets, draws))
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
    budgets: Sequence[float],
    draws: int,
) -> Recovered:
    values: dict[str, list[float]] = {}
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    by_name = {}
    spent = [_items(by_task[task]) for task in own]
    for task in tasks:
        cell = full[task][0][0]
        ours, theirs = _items(by_task[task]), _items(full[task])
        if ours.scores.shape[1] != theirs.scores.shape[1]:
            raise UserError(
                f"{pattern} and full attention were run on different numbers of items of {task}; "
                "run both with one --limit"
            )
        group = group_of(task, cell.metric)
        chance = cell.chance or 0.0
        if group != LANGUAGE and theirs.scores.mean() - chance < _LEAST_ABOVE_CHANCE:
            continue
        value, samples = _bootstrap(ours.scores, theirs.scores[0], group, chance, task, draws)
        values.setdefault(group, []).append(value)
        drawn.setdefault(group, []).append(samples)
        by_name[task] = value
    groups = {
        group: _interval(float(np.mean(values[group])), np.mean(drawn[group], axis=0))
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
        budget=next((budget for budget in budgets if share <= budget * _OVER), None),
        share=share,
        visited=float(np.mean(visited)) if visited else None,
        mean_keys=float(np.mean([items.mean_keys for items in spent])),
        seeds=max(len(items.scores) for items in spent),
        groups=groups,
        tasks=by_name,
        mean=_interval(mean, samples),
        draws=samples,
    )


def _bootstrap(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    group: str,
    chance: float,
    task: str,
    draws: int,
) -> tuple[float, NDArray[np.float64]]:
    """Recovery of ``ours [seeds, items]`` against ``theirs [items]``, and its bootstrap."""
    # Seeded by the task alone, so that every pattern meets the same items in the same draw.
    generator = np.random.default_rng(list(task.encode()))
    items = generator.integers(0, len(theirs), (draws, len(theirs)))
    seeds = generator.integers(0, 1 << 30, (draws, len(ours))) % len(ours)
    mine = np.stack(
        [ours[rows][:, columns].mean() for rows, columns in zip(seeds, items, strict=True)]
    )
    reference = theirs[items].mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if group == LANGUAGE:
            return float(theirs.mean() / ours.mean()), reference / mine
        above = np.maximum(reference - chance, _LEAST_ABOVE_CHANCE)
        # (mine - chance) / above, in a form that stays 1 for equal scores where `above` is floored.
        samples = 1 - (reference - mine) / above
        return float((ours.mean() - chance) / (theirs.mean() - chance)), samples


def _interval(value: float, samples: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(samples, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def difference(one: Recovered, other: Recovered) -> Interval:
    """By how much one point recovers more than another of the same length, paired."""
    return _interval(one.mean.value - other.mean.value, one.draws - other.draws)


def load(paths: Sequence[Path]) -> list[Run]:
    """The runs of some folders; a folder without a manifest stands for the runs inside it."""
    from sa_patch.sweep.results import load_run

    folders: list[Path] = []
    for path in paths:
        inner = sorted(found.parent for found in path.glob("*/manifest.json"))
        folders += inner if inner and not (path / "manifest.json").exists() else [path]
    return [load_run(folder) for folder in folders]


def parse_budgets(text: str) -> list[float]:
    """Shares of FLOPs from text such as ``0.0625,1/8``, ascending.

    Raises:
        UserError: if one is no number above 0 and at most 1.
    """
    budgets = []
    for piece in text.split(","):
        top, slash, bottom = piece.partition("/")
        try:
            share = float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError):
            share = 0.0
        if not 0 < share <= 1:
            raise UserError(
                f"budgets are shares of full attention's FLOPs, such as 0.0625,1/8; got {piece!r}"
            )
        budgets.append(share)
    return sorted(budgets)
