"""The Pareto figure: which method gives the best score for what it spends."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.report.accuracy_figures import (
    AXES,
    Curve,
    curves,
    draw_baseline,
    finish_panel,
    value_label,
)
from sa_patch.report.aggregate import AVERAGE, Comparison, Point
from sa_patch.report.series_style import Style, legend_handles, series_styles

FRONTIER = "#404040"
SMALL_MARKER = 5.5
PANEL, COLUMNS = (3.9, 2.9), 3  # inches; panels in a row


def frontier(
    places: Sequence[tuple[float, float]], higher_is_better: bool
) -> list[tuple[float, float]]:
    """The points (cost, score) that no other beats: cheaper or equal, and better or equal.

    They come in order of cost; of equal points one is kept.
    """
    sign = 1.0 if higher_is_better else -1.0
    best: list[tuple[float, float]] = []
    for cost, rows in groupby(sorted(places), key=lambda place: place[0]):
        score = max((score for _, score in rows), key=lambda score: sign * score)
        if not best or sign * score > sign * best[-1][1]:
            best.append((cost, score))
    return best


def draw_pareto(comparison: Comparison, x: str, caption: Caption) -> Figure | None:
    """Score against cost, all methods in one panel per task, and one for the average over tasks.

    ``x``: a cost, any axis but "window". ``None`` if no sparse point has a measured cost.
    """
    panels = [list(comparison.averages)] if len(comparison.average_tasks) > 1 else []
    panels += sorted(
        (list(comparison.of_task(task)) for task in comparison.tasks),
        key=lambda points: not points[0].is_accuracy,
    )
    panels = [points for points in panels if _sparse(curves(points, x))]
    if not panels:
        return None
    columns = min(COLUMNS, len(panels))
    layout = Layout(
        caption,
        [*legend_handles(comparison, full_has_place=True), _frontier_sample()],
        (math.ceil(len(panels) / columns), columns),
        PANEL,
        panel_titles=True,
    )
    styles = series_styles(comparison.series)
    for index, points in enumerate(panels):
        axes = layout.panel(index)
        drawn = curves(points, x)
        for curve in drawn:
            if curve.series.is_full:
                draw_baseline(axes, curve, styles[curve.series])
            else:
                _draw_points(axes, curve, styles[curve.series])
        finish_panel(axes, points[0], drawn, 10)
        _draw_frontier(axes, _sparse(drawn), points[0].higher_is_better)
        axes.set_title(_title(points[0], comparison), fontsize=FONT + 1, loc="left")
        axes.set_ylabel("accuracy, %" if points[0].task == AVERAGE else value_label(points[0]))
        if index + columns >= len(panels):
            axes.set_xlabel(AXES[x])
    return layout.figure


def _sparse(drawn: Sequence[Curve]) -> list[Curve]:
    return [curve for curve in drawn if not curve.series.is_full]


def _title(point: Point, comparison: Comparison) -> str:
    if point.task == AVERAGE:
        return f"average over {len(comparison.average_tasks)} tasks"
    return point.task if point.samples is None else f"{point.task}  ({point.samples:,} items)"


def _draw_points(axes: Axes, curve: Curve, style: Style) -> None:
    # The faint line ties a method's points together; which are best is the frontier's to say.
    axes.plot(curve.x, curve.y, color=style.colour, linestyle=style.line, linewidth=0.9, alpha=0.55)
    axes.errorbar(
        curve.x,
        curve.y,
        yerr=curve.error,
        color=style.colour,
        fmt="none",
        elinewidth=0.8,
        alpha=0.35,
    )
    for place, value, hollow in zip(curve.x, curve.y, curve.saturated, strict=True):
        axes.plot(
            [place],
            [value],
            color=style.colour,
            marker=style.marker,
            markersize=SMALL_MARKER,
            markerfacecolor="white" if hollow else style.colour,
            linestyle="none",
            zorder=4,
        )


def _draw_frontier(axes: Axes, drawn: Sequence[Curve], higher_is_better: bool) -> None:
    """A staircase: the best score that at most so much buys, up to the panel's right edge."""
    places = [place for curve in drawn for place in zip(curve.x, curve.y, strict=True)]
    best = frontier(places, higher_is_better)
    costs = [cost for cost, _ in best] + [axes.get_xlim()[1]]
    scores = [score for _, score in best] + [best[-1][1]]
    axes.step(costs, scores, where="post", **_FRONTIER_LOOK)


_FRONTIER_LOOK: dict[str, Any] = {"color": FRONTIER, "linewidth": 2.2, "alpha": 0.45, "zorder": 2.2}


def _frontier_sample() -> Line2D:
    return Line2D([], [], label="Pareto frontier of the sparse methods", **_FRONTIER_LOOK)
