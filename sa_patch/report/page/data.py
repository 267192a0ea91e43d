"""What the report page shows, as plain values for JSON: points, series, tasks and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sa_patch.figures.layout import LineStyle
from sa_patch.report import captions
from sa_patch.report.accuracy_figures import AXES
from sa_patch.report.aggregate import AVERAGE, Comparison, Point, compare
from sa_patch.report.page.colours import BASELINE_CONTRAST, MIN_CONTRAST, legible
from sa_patch.report.page.commands import remake_command
from sa_patch.report.series import Namer, Series
from sa_patch.report.series_style import Style, series_styles
from sa_patch.sweep.results import Cell, Run

SCHEMA = 1
TOGETHER = "all runs together"
# matplotlib's markers under plotly's names.
SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    ">": "triangle-right",
    "<": "triangle-left",
    "d": "diamond-tall",
    "D": "diamond",
    "p": "pentagon",
    "P": "cross",
    "X": "x",
    "h": "hexagon",
    "8": "octagon",
    "*": "star",
}
DASHES = {"-": "solid", "-.": "dashdot", ":": "dot"}


def page_data(
    runs: Sequence[Run],
    cells: Sequence[Cell],
    comparison: Comparison,
    notes: Sequence[str],
    unused: Sequence[str],
) -> dict[str, Any]:
    """All that the page knows.

    ``views`` holds the points of all runs together and, where there are several runs, of each by
    itself; series and tasks keep their names and looks in all of them. Values are in raw units:
    accuracies as fractions of 1, FLOPs per sequence, shares as fractions of 1. ``notes``: how to
    read the figures. ``unused``: what was set aside, and why.
    """
    by_path = {str(run.path): run for run in runs}
    commands: dict[str, int] = {}
    namer = Namer(cells)
    comparisons = {TOGETHER: comparison}
    if len(runs) > 1:
        names = _run_names(runs)
        comparisons |= {
            name: compare(run.cells, namer) for name, run in zip(names, runs, strict=True)
        }
    every = dict.fromkeys(series for one in comparisons.values() for series in one.series)
    tasks = dict.fromkeys(task for one in comparisons.values() for task in one.tasks)
    styles = series_styles(comparison.series)
    missing, subset = captions.missing_note(runs), captions.subset_note(cells)
    return {
        "schema": SCHEMA,
        "title": captions.models(cells),
        "warnings": [note for note in (missing, subset) if note],
        "axes": AXES,
        "average": AVERAGE,
        "tasks": list(tasks),
        "models": list(dict.fromkeys(str(cell.setting["model_name"]) for cell in cells)),
        "series": [_series(one, styles[one]) for one in every],
        "views": [
            {
                "name": name,
                "averaged": list(one.average_tasks),
                "points": [
                    _point(point, list(every), by_path, commands)
                    for point in (*one.averages, *one.points)
                ],
            }
            for name, one in comparisons.items()
        ],
        "commands": list(commands),
        "notes": list(notes),
        "provenance": [_pair(line) for line in captions.provenance((), cells, comparison)],
        "runs": [
            {"name": name, "provenance": [_pair(line) for line in captions.run_lines(run)]}
            for name, run in zip(_run_names(runs), runs, strict=True)
        ],
        "unused": list(unused),
    }


def _run_names(runs: Sequence[Run]) -> list[str]:
    """A run's folder, with as many of the folders above as tell it from the others."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _series(series: Series, style: Style) -> dict[str, Any]:
    least = BASELINE_CONTRAST if series.is_full else MIN_CONTRAST
    return {
        "label": series.label,
        "family": series.family,
        "full": series.is_full,
        "light": legible(style.colour, dark=False, least=least),
        "dark": legible(style.colour, dark=True, least=least),
        "symbol": SYMBOLS[style.marker],
        "dash": _dash(style.line),
    }


def _dash(line: LineStyle) -> str:
    """plotly's name of a line style, or lengths in pixels."""
    if isinstance(line, str):
        return DASHES[line]
    return ",".join(f"{2 * length}px" for length in line[1])


def _point(
    point: Point, series: Sequence[Series], runs: Mapping[str, Run], commands: dict[str, int]
) -> dict[str, Any]:
    command = remake_command(point.cells, runs)
    return {
        "series": series.index(point.series),
        "model": str(point.cells[0].setting["model_name"]),
        "task": point.task,
        "metric": point.metric,
        "accuracy": point.is_accuracy,
        "higher": point.higher_is_better,
        "chance": point.chance,
        "pattern": point.pattern,
        "window": point.window,
        "value": point.value,
        "error": point.error,
        "seeds": [seed for seed in point.seeds if seed is not None],
        "samples": point.samples,
        "mean_keys": point.mean_keys,
        "last_query_keys": point.last_query_keys,
        "prompt_mean": point.prompt_mean,
        "flops": point.flops,
        "flops_share": point.flops_share,
        "visited_share": point.visited_share,
        "seconds": point.seconds,
        "saturated_fraction": point.saturated_fraction,
        "saturated": point.saturated,
        "by_depth": [list(pair) for pair in point.by_depth],
        "command": commands.setdefault(command, len(commands)),
    }


def _pair(line: str) -> list[str]:
    name, _, value = line.partition(": ")
    return [name, value]
