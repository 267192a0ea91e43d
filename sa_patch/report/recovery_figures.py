"""Figures of recovery: what patterns keep against what they spend, and one below the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.evaluation.recovery import Interval
from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.patterns import RIVALS, BlockTopK, ByHead, parse_pattern, parts_of
from sa_patch.report.recovery import Recovered
from sa_patch.report.recovery_items import GROUPS
from sa_patch.report.variants import METHOD_LABELS

# What budgets are shares of.
SPENT = {"flops": "attention FLOPs", "visited": "keys that a tile reads"}
# In the order in which a composition's parts are named.
_KINDS = (
    *("sinks", "swa", "sa", "psa", "moba", "block_topk", "tail"),
    *(cls.name for cls in RIVALS),
    ByHead.name,
)
_PANEL = (4.6, 3.4)  # inches
_CHARACTER = 0.072  # inches, of the legend
# What tells nothing beside the other numbers.
_SAID = {"branch=0", "local=0"}
OURS, OTHERS = COLOURS["sa"], COLOURS["swa"]
_BY_HEAD = f"{ByHead.name}{{"
_OF_OTHERS = {*(cls.name for cls in RIVALS), ByHead.name}
_ROW, _MARGIN, _WIDTH = 0.24, 0.9, 3.1  # inches: of a pattern, around rows, of a column


def draw(points: Sequence[Recovered], by: str = "flops") -> Figure:
    """Mean recovery against cost: a panel for each length, a colour for each composition.

    Patterns of one composition differ in their numbers, also within a budget; its line joins the
    best of each budget.
    """
    lengths = sorted({point.n for point in points})
    names = list(dict.fromkeys(composition(p) for p in _by_quality(points)))
    columns = min(2, len(lengths))
    rows = -(-len(lengths) // columns)
    # The legend takes two columns where the figure is wide enough for its labels.
    entry = _CHARACTER * max(map(len, names), default=0) + 0.6
    legend_columns = 2 if 2 * entry <= columns * _PANEL[0] else 1
    legend = 0.19 * -(-len(names) // legend_columns) + 0.5
    width, height = max(columns * _PANEL[0], entry), rows * _PANEL[1] + legend
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(lengths):
            axes.set_visible(False)
            continue
        _panel(axes, [point for point in points if point.n == lengths[place]], names, by)
        axes.set_title(f"n = {lengths[place]:,}", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=legend_columns,
        fontsize=8,
        frameon=False,
    )
    return figure


def composition(point: Recovered) -> str:
    """The kinds of a point's parts, whatever their numbers; how a choice is made is of the kind."""
    labels = {}
    for part in parts_of(parse_pattern(point.pattern)):
        shared = "shared " * (getattr(part, "shared", 1) > 1)
        threshold = "thresholded " * (isinstance(part, BlockTopK) and part.threshold > 0)
        labels[part.name] = f"{shared}{threshold}{METHOD_LABELS[part.name]}"
    kinds = " + ".join(labels[kind] for kind in _KINDS if kind in labels)
    if point.layers == "all":
        return kinds
    return f"{kinds}; {'by head' if _BY_HEAD in point.layers else 'other'} in some layers"


def _by_quality(points: Sequence[Recovered]) -> list[Recovered]:
    return sorted(points, key=lambda point: -point.mean.value)


def _panel(axes: Axes, points: Sequence[Recovered], names: Sequence[str], by: str) -> None:
    def spent(point: Recovered) -> float:
        return point.share if by == "flops" or point.visited is None else point.visited

    colours = (*COLOURS.values(), *OTHER_COLOURS, FULL_COLOUR)
    markers = "os^DvPX*"
    for index, name in enumerate(names):
        own = [point for point in points if composition(point) == name]
        style: dict[str, Any] = {
            "color": colours[index % len(colours)],
            "marker": markers[index // len(colours) % len(markers)],
            "linewidth": 1.2,
        }
        line_style = "-" if index < len(colours) else "--"
        axes.errorbar(
            [spent(point) for point in own],
            [point.mean.value for point in own],
            yerr=[
                [max(0.0, point.mean.value - point.mean.low) for point in own],
                [max(0.0, point.mean.high - point.mean.value) for point in own],
            ],
            label=name,
            markersize=5,
            capsize=2,
            elinewidth=0.7,
            linestyle="",
            **style,
        )
        best: dict[float | None, Recovered] = {}
        for point in sorted(own, key=lambda point: point.mean.value):
            best[point.budget] = point
        line = sorted(best.values(), key=spent)
        axes.plot(
            [spent(point) for point in line],
            [point.mean.value for point in line],
            linestyle=line_style,
            markersize=0,
            **style,
        )
    axes.axhline(1.0, color="black", linewidth=1, linestyle=(0, (5, 3)))
    axes.axhline(0.95, color="#8C8C8C", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda share, _: f"1/{1 / share:g}" if share < 1 else f"{share:g}"
    )
    axes.tick_params(labelbottom=True, labelleft=True)
    axes.set_xlabel(f"{SPENT[by]}, share of full attention's", fontsize=9)
    axes.set_ylabel("mean recovery", fontsize=9)
    axes.tick_params(labelsize=8)


def of_others(point: Recovered) -> bool:
    """Whether a method of others is a part of a point's pattern, or some layers go by head."""
    own = {part.name for part in parts_of(parse_pattern(point.pattern))}
    return bool(own & _OF_OTHERS) or _BY_HEAD in point.layers


def draw_ranking(places: Sequence[Sequence[Recovered]], by: str = "flops") -> Figure:
    """A row of panels for each length and budget: the mean, then each group of tasks.

    Args:
        places: points of one length and budget in the order of their rows, best first.
    """
    labels = [_row_labels(own) for own in places]
    shown = [group for group in GROUPS if any(group in p.groups for own in places for p in own)]
    columns = ["mean", *shown] if len(shown) > 1 else shown
    heights = [len(own) * _ROW + _MARGIN for own in places]
    longest = max(len(label) for own in labels for label in own)
    size = (len(columns) * _WIDTH + 0.075 * longest, sum(heights) + 0.4)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        len(places), len(columns), squeeze=False, height_ratios=heights, sharex="col", sharey="row"
    )
    for row, own in enumerate(places):
        for column, group in enumerate(columns):
            axes = grid[row, column]
            _ranked(axes, own, group)
            title = f"{_place(own[0])}\n{group}" if column == 0 else group
            axes.set_title(title, fontsize=9, loc="left")
        grid[row, 0].set_yticks(range(len(own)), labels[row], fontsize=8)
        grid[row, 0].set_ylim(len(own) - 0.4, -0.6)
    if any(of_others(point) for own in places for point in own):
        legend = (OURS, "windows, SA, MoBA, BlockTopK"), (OTHERS, "methods of others")
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colour, label=label)
            for colour, label in legend
        ]
        place = "outside lower center"
        figure.legend(handles=handles, loc=place, ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"kept at equal {SPENT[by]}", fontsize=10)
    return figure


def _place(point: Recovered) -> str:
    """The length and the budget of a point."""
    if point.budget is None:
        return f"n = {point.n:,}, more than the budgets"
    if point.budget == 1:
        return f"n = {point.n:,}, any budget"
    parts = 1 / point.budget
    whole = abs(parts - round(parts)) < 1e-6
    return f"n = {point.n:,}, at most " + (f"1/{round(parts)}" if whole else f"{point.budget:.3g}")


def _ranked(axes: Axes, points: Sequence[Recovered], group: str) -> None:
    for place, point in enumerate(points):
        found: Interval | None = point.mean if group == "mean" else point.groups.get(group)
        if found is None:
            continue
        colour = OTHERS if of_others(point) else OURS
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=1.2)
        axes.plot([found.value], [place], "o", color=colour, markersize=5)
    axes.axvline(1.0, color=FULL_COLOUR, linewidth=1, linestyle=(0, (5, 3)))
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, labelbottom=True)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("recovery (1: full attention)", fontsize=8)


def _row_labels(points: Sequence[Recovered]) -> list[str]:
    """Compositions, with the numbers that differ where several are of one."""
    words = [set(re.split("[:,;+|{}]", point.pattern)) for point in points]
    labels = [composition(point) for point in points]
    found = []
    for own, label in zip(words, labels, strict=True):
        alike = [other for other, name in zip(words, labels, strict=True) if name == label]
        numbers = sorted(own - set.intersection(*alike) - _SAID) if len(alike) > 1 else []
        found.append(f"{label} ({', '.join(numbers)})" if numbers else label)
    return found
