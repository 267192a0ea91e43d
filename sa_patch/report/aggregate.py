"""Aggregate cells over seeds and tasks into points, with their error bars.

**Mean.** A point is one series (method with its parameters) at one window on one task: the
arithmetic mean of the primary metric over the seeds.

**Average over tasks.** The unweighted mean of the primary accuracies, over the tasks that *every*
point of the comparison has (every series, every window, and the full baseline), so that no point
is flattered by an easier set. Only seeds that a point has on all of those tasks enter. Scores that
are no accuracies (lower is better, or outside 0 to 1: perplexities) never enter.

**Error bar.** One standard error, of a mean over ``T`` tasks (``T = 1``: a single task) and ``S``
seeds, as an estimate of the expected score for a fresh seed set and fresh items:

    error = sqrt( var_s(A_s) / S  +  sum_t mean_s(e_ts^2) / T^2 )

``A_s`` is seed ``s``'s mean over the tasks, ``var_s`` the unbiased variance over seeds (taken as 0
for a single seed), ``e_ts`` the item-sampling error of one cell: the standard error that lm-eval
reports, or for an accuracy without one the binomial ``sqrt(p (1 - p) / (items - 1))``. The sampling
part is not divided by ``S``: all seeds answer the same items. If a sampling error is unknown (a
perplexity without one) the bar holds the seed part alone, and there is none for a single seed.
"""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sa_patch.report.series import Namer, Series
from sa_patch.sweep.results import Cell

AVERAGE = "average"
# A task's accuracy on the items whose needle lies near this depth, in % of the text.
DEPTH_METRIC = re.compile(r"acc_depth_(\d+),.*")


@dataclass(frozen=True)
class Point:
    """One aggregated result; ``error`` and its parts are in the unit of ``value``.

    ``pattern`` is the text form without its seed. ``samples`` counts items per seed. ``flops`` and
    ``full_flops`` are per sequence; ``flops_share`` is ``flops / full_flops`` (for an average over
    tasks: the mean of the tasks' shares). ``seconds`` is the time in the model per sequence.
    Measured figures are means over seeds (and tasks).
    ``by_depth`` holds pairs of a needle's depth in % of the text and the score there, for tasks
    that give it. ``cells`` are the results that the point was made from.
    """

    series: Series
    window: int | None
    pattern: str
    task: str
    metric: str
    higher_is_better: bool
    is_accuracy: bool
    chance: float | None
    value: float
    error: float | None
    seed_error: float | None
    sampling_error: float | None
    seeds: tuple[int | None, ...]
    samples: int | None
    mean_keys: float | None
    last_query_keys: float | None
    prompt_mean: float | None
    flops: float | None
    full_flops: float | None
    flops_share: float | None
    visited_share: float | None
    seconds: float | None
    saturated_fraction: float | None
    by_depth: tuple[tuple[int, float], ...]
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def saturated(self) -> bool:
        """Dense in at least half of the sequences. The full baseline is dense by definition."""
        if self.series.is_full or self.saturated_fraction is None:
            return False
        return self.saturated_fraction >= 0.5


@dataclass(frozen=True)
class Comparison:
    """All points of a report. ``averages`` is empty if no task is shared by every point."""

    series: tuple[Series, ...]
    tasks: tuple[str, ...]
    points: tuple[Point, ...]
    averages: tuple[Point, ...]
    average_tasks: tuple[str, ...]
    left_out: dict[str, str]
    repeated: tuple[Cell, ...]

    def of_task(self, task: str) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.task == task)


Place = tuple[Series, int | None]


def compare(cells: Sequence[Cell], namer: Namer | None = None) -> Comparison:
    """Group cells into points. Two cells with the same series, window, task and seed (the full
    baseline of two runs that differ only in ``decode``, say) count once: the later are
    ``repeated``. ``namer``: of a larger set, where series and tasks are to be named alike."""
    namer = namer or Namer(cells)
    groups: dict[Place, dict[str, dict[int | None, Cell]]] = {}
    repeated: list[Cell] = []
    tasks: dict[str, None] = {}
    for cell in cells:
        task = namer.task(cell)
        tasks.setdefault(task)
        place = (namer.series(cell), cell.setting["window"])
        seeds = groups.setdefault(place, {}).setdefault(task, {})
        if cell.setting["seed"] in seeds:
            repeated.append(cell)
        else:
            seeds[cell.setting["seed"]] = cell
    places = sorted(groups, key=lambda place: (place[0].rank, place[1] or 0))
    points = [
        _point(place, task, [groups[place][task]], namer)
        for place in places
        for task in tasks
        if task in groups[place]
    ]
    accuracy_tasks = _accuracy_tasks(tasks, points)
    shared = tuple(
        task for task in accuracy_tasks if all(task in groups[place] for place in places)
    )
    averages = []
    if shared:
        for place in places:
            common = set.intersection(*(set(groups[place][task]) for task in shared))
            if common:
                by_task = [
                    {seed: cell for seed, cell in groups[place][task].items() if seed in common}
                    for task in shared
                ]
                averages.append(_point(place, AVERAGE, by_task, namer))
    left_out = {
        task: "not an accuracy"
        if task not in accuracy_tasks
        else "no result yet for " + _where(place for place in places if task not in groups[place])
        for task in tasks
        if task not in shared
    }
    series = tuple(dict.fromkeys(place[0] for place in places))
    return Comparison(
        series, tuple(tasks), tuple(points), tuple(averages), shared, left_out, tuple(repeated)
    )


def _accuracy_tasks(tasks: Iterable[str], points: Sequence[Point]) -> list[str]:
    return [
        task for task in tasks if all(point.is_accuracy for point in points if point.task == task)
    ]


def _where(places: Iterable[Place]) -> str:
    names = [
        series.label if window is None else f"{series.label} at window {window}"
        for series, window in places
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _point(
    place: Place, task: str, by_task: Sequence[dict[int | None, Cell]], namer: Namer
) -> Point:
    """``by_task``: for each of the T tasks, the cell of each seed (the same seeds in each)."""
    cells = [cell for seeds in by_task for cell in seeds.values()]
    first = cells[0]
    seeds = tuple(sorted(by_task[0], key=lambda seed: -1 if seed is None else seed))
    seed_means = [statistics.fmean(tasks[seed].value for tasks in by_task) for seed in seeds]
    seed_error = _standard_error(seed_means)
    sampling_error = _sampling_error(by_task)
    parts = [part for part in (seed_error, sampling_error) if part is not None]
    single = len(by_task) == 1
    metrics = {cell.metric for cell in cells}
    chances = [next(iter(tasks.values())).chance for tasks in by_task]
    return Point(
        series=place[0],
        window=place[1],
        pattern=namer.seedless(first),
        task=task,
        metric=first.metric if len(metrics) == 1 else "mean of primary accuracies",
        higher_is_better=first.higher_is_better,
        is_accuracy=all(_is_accuracy(cell) for cell in cells),
        chance=_mean(chances),
        value=statistics.fmean(seed_means),
        error=math.hypot(*parts) if parts else None,
        seed_error=seed_error,
        sampling_error=sampling_error,
        seeds=seeds,
        samples=_samples(by_task),
        mean_keys=_mean(cell.mean_keys for cell in cells),
        last_query_keys=_mean(cell.last_query_keys for cell in cells),
        prompt_mean=_mean(cell.prompt_mean for cell in cells),
        flops=_mean(cell.flops for cell in cells) if single else None,
        full_flops=_mean(cell.full_flops for cell in cells) if single else None,
        flops_share=_mean(_share(cell) for cell in cells),
        visited_share=_mean(cell.visited_share for cell in cells),
        seconds=_mean(cell.model_seconds for cell in cells),
        saturated_fraction=_mean(cell.saturated_fraction for cell in cells),
        by_depth=_by_depth(cells) if single else (),
        cells=tuple(cells),
    )


def _by_depth(cells: Sequence[Cell]) -> tuple[tuple[int, float], ...]:
    """Depths that every seed has, each with the mean over seeds."""
    scores: dict[int, list[float]] = {}
    for cell in cells:
        for key, score in cell.scores.items():
            named = DEPTH_METRIC.fullmatch(key)
            if named is not None and score is not None:
                scores.setdefault(int(named[1]), []).append(score)
    return tuple(
        (depth, statistics.fmean(scores[depth]))
        for depth in sorted(scores)
        if len(scores[depth]) == len(cells)
    )


def _is_accuracy(cell: Cell) -> bool:
    return cell.higher_is_better and 0.0 <= cell.value <= 1.0


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _sampling_error(by_task: Sequence[dict[int | None, Cell]]) -> float | None:
    variance = 0.0
    for seeds in by_task:
        errors = [_cell_error(cell) for cell in seeds.values()]
        known = [error for error in errors if error is not None]
        if len(known) < len(errors):
            return None
        variance += statistics.fmean(error**2 for error in known)
    return math.sqrt(variance) / len(by_task)


def _cell_error(cell: Cell) -> float | None:
    if cell.stderr is not None:
        return cell.stderr
    if _is_accuracy(cell) and cell.samples is not None and cell.samples > 1:
        return math.sqrt(cell.value * (1 - cell.value) / (cell.samples - 1))
    return None


def _samples(by_task: Sequence[dict[int | None, Cell]]) -> int | None:
    """Items per seed, summed over tasks; the smallest over seeds if they differ."""
    counts = [
        [cell.samples for cell in seeds.values() if cell.samples is not None] for seeds in by_task
    ]
    return sum(min(count) for count in counts) if all(counts) else None


def _share(cell: Cell) -> float | None:
    return None if cell.flops is None or not cell.full_flops else cell.flops / cell.full_flops


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or ``None`` if any value is unknown: half a mean would mislead."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return statistics.fmean(value for value in known if value is not None)
