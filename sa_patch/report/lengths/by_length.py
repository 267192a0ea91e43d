"""A comparison's points by length: tasks that were run at several, and what is kept at each.

**Average.** At each length the unweighted mean of the accuracies of the tasks that every pattern
has at that length. **Kept.** In the way RULER is read (arXiv 2404.06654): the longest length up to
which a pattern's average, there and at every shorter one, is at least `KEPT` of full attention's.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from sa_patch.report.aggregate import Comparison, Point
from sa_patch.report.series import Series

KEPT = 0.85
_LENGTH = re.compile(r"(.+)_(\d{3,})")
Row = tuple[Series, int | None]
Scores = Mapping[int, float]


@dataclass(frozen=True)
class ByLength:
    """Points of accuracies by row, task without its length, and length.

    Attributes:
        rows: series and windows, in the order of tables.
        tasks: that were run at two lengths or more.
        lengths: all of theirs, rising.
    """

    rows: tuple[Row, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    points: Mapping[tuple[Row, str, int], Point]

    def scores(self, row: Row, task: str) -> dict[int, float]:
        """A row's scores on one task, 0 to 1, by length."""
        return {
            length: point.value
            for length in self.lengths
            if (point := self.points.get((row, task, length))) is not None
        }

    def averages(self, row: Row) -> dict[int, float]:
        """A row's mean scores over the tasks that all rows have at a length."""
        return {
            length: statistics.fmean(self.points[row, task, length].value for task in tasks)
            for length in self.lengths
            if (tasks := self.shared(length))
        }

    def shares(self, row: Row) -> dict[int, float]:
        """Measured attention FLOPs over full attention's, likewise."""
        found: dict[int, float] = {}
        for length in self.lengths:
            known = [self.points[row, task, length].flops_share for task in self.shared(length)]
            shares = [share for share in known if share is not None]
            if shares and len(shares) == len(known):
                found[length] = statistics.fmean(shares)
        return found

    def shared(self, length: int) -> tuple[str, ...]:
        """The tasks that every row has at a length."""
        return tuple(
            task
            for task in self.tasks
            if all((row, task, length) in self.points for row in self.rows)
        )

    def full_of(self, row: Row) -> Row | None:
        """The row of full attention that a row is read against: the same model's."""
        own = self._model(row)
        full = (other for other in self.rows if other[0].is_full and self._model(other) == own)
        return next(full, None)

    def _model(self, row: Row) -> tuple[str, str | None]:
        first = next(point for (own, _, _), point in self.points.items() if own == row)
        setting = first.cells[0].setting
        return setting["model"], setting.get("dtype")


def by_length(comparison: Comparison) -> ByLength | None:
    """The points of patterns and tasks that were run at several lengths; None if there are none."""
    found: dict[tuple[Row, str, int], Point] = {}
    for point in comparison.points:
        named = _LENGTH.fullmatch(point.cells[0].task)
        if named is not None and point.is_accuracy and point.task == point.cells[0].task:
            found[(point.series, point.window), named[1], int(named[2])] = point
    lengths_of: dict[tuple[Row, str], set[int]] = {}
    for row, task, length in found:
        lengths_of.setdefault((row, task), set()).add(length)
    several = [pair for pair, lengths in lengths_of.items() if len(lengths) > 1]
    # A pattern that was made for one length has no place here.
    kept_rows, tasks = {row for row, _ in several}, tuple(dict.fromkeys(t for _, t in several))
    points = {key: one for key, one in found.items() if key[0] in kept_rows and key[1] in tasks}
    if not points:
        return None
    rows = tuple(dict.fromkeys(row for row, _, _ in points))
    lengths = tuple(sorted({length for _, _, length in points}))
    return ByLength(rows, tasks, lengths, points)


def kept_up_to(scores: Scores, full: Scores) -> int | None:
    """The longest length up to which `scores` are at least `KEPT` of `full`; None if none is."""
    longest = None
    for length in sorted(full):
        # Where full attention finds nothing, there is nothing to keep.
        if not full[length] or scores.get(length, 0.0) < KEPT * full[length]:
            break
        longest = length
    return longest


def row_name(row: Row) -> str:
    """A row's pattern, with its window where it has one."""
    series, window = row
    return series.label if window is None else f"{series.label}  @{window}"
