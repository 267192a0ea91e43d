"""Figures of a report: average accuracy, and a panel per task, against a chosen axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_patch.errors import UserError
from sa_patch.figures.axes import keep_points_apart, scale_log_y, scale_x
from sa_patch.figures.layout import FONT, MARKER_SIZE, Caption, Layout
from sa_patch.report.aggregate import Comparison, Point
from sa_patch.report.series import Series
from sa_patch.report.series_style import (
    CHANCE_COLOUR,
    Style,
    legend_handles,
    series_styles,
)

AXES = {
    "window": "window (keys per query allowed)",
    "mean_keys": "keys per query, measured mean",
    "flops": "attention FLOPs, % of full attention",
    "visited": "keys that a tile reads, % of full attention",
    "seconds": "seconds per sequence, measured",
}
# Sideways shift between neighbouring series on the window axis, and from first to last, in octaves.
DODGE, DODGE_SPAN = 0.08, 0.3
PANEL_COLUMNS = 4
BIG_PANEL, SMALL_PANEL = (6.4, 3.9), (2.8, 2.15)  # inches


@dataclass(frozen=True)
class Curve:
    """One drawn series: ``x`` in the axis' unit (FLOPs in % of full), ``y`` and ``error`` in the
    unit drawn (accuracies in %); ``error`` is 0 where unknown. ``window`` belongs to each point."""

    series: Series
    window: tuple[int | None, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float, ...]
    saturated: tuple[bool, ...]


def check_axis(x: str) -> None:
    """Raises ``UserError`` if ``x`` is no axis that reports know."""
    if x not in AXES:
        raise UserError(f"unknown x axis {x!r}; choose one of {', '.join(AXES)}")


def check_measured(comparison: Comparison, x: str) -> None:
    """Raises ``UserError`` if no point has a place on the axis ``x``."""
    if all(_place(point, x) is None for point in comparison.points):
        known = [
            axis for axis in AXES if any(_place(p, axis) is not None for p in comparison.points)
        ]
        raise UserError(
            f"nothing to draw against {x}: these runs were made without measuring it; sweep again, "
            f"or choose --x {' or '.join(known)}"
        )


def curves(points: Sequence[Point], x: str) -> list[Curve]:
    """The points of one panel as drawn, by series. A point without a place on the axis is left out
    (a pattern without a window keeps it, and becomes a horizontal line on the window axis)."""
    found = []
    for series in dict.fromkeys(point.series for point in points):
        rows = [
            (point.window, place, point)
            for point in points
            if point.series == series and (place := _place(point, x)) is not None
        ]
        if rows:
            scales = [100.0 if point.is_accuracy else 1.0 for _, _, point in rows]
            scaled = [
                (p.value * s, (p.error or 0.0) * s)
                for (_, _, p), s in zip(rows, scales, strict=True)
            ]
            found.append(
                Curve(
                    series,
                    tuple(window for window, _, _ in rows),
                    tuple(place for _, place, _ in rows),
                    tuple(value for value, _ in scaled),
                    tuple(error for _, error in scaled),
                    tuple(point.saturated for _, _, point in rows),
                )
            )
    return found


def draw_average(comparison: Comparison, x: str, caption: Caption) -> Figure:
    """Average accuracy over ``comparison.average_tasks`` against ``x`` (the paper's Figure 4)."""
    starred = x != "window"
    handles = legend_handles(comparison, full_has_place=starred)
    layout = Layout(caption, handles, (1, 1), BIG_PANEL, panel_titles=False)
    axes = layout.panel(0)
    _draw_panel(axes, comparison.averages, x, comparison)
    tasks = comparison.average_tasks
    many = f"average accuracy over {len(tasks)} tasks, %"
    axes.set_ylabel(many if len(tasks) > 1 else f"accuracy on {tasks[0]}, %")
    axes.set_xlabel(AXES[x])
    return layout.figure


def draw_tasks(comparison: Comparison, x: str, caption: Caption) -> Figure:
    """One panel per task against ``x`` (the paper's Figure 5); accuracies come first."""
    panels = [comparison.of_task(task) for task in comparison.tasks]
    panels.sort(key=lambda points: not points[0].is_accuracy)
    columns = _columns(len(panels))
    layout = Layout(
        caption,
        legend_handles(comparison, full_has_place=x != "window"),
        (math.ceil(len(panels) / columns), columns),
        BIG_PANEL if columns == 1 else SMALL_PANEL,
        panel_titles=True,
    )
    for index, points in enumerate(panels):
        axes = layout.panel(index)
        _draw_panel(axes, points, x, comparison)
        items = points[0].samples
        count = "" if items is None else f"  ({items:,} items)"
        axes.set_title(f"{points[0].task}{count}", fontsize=FONT + 1, loc="left")
        axes.set_ylabel(value_label(points[0]))
        if index + columns >= len(panels):
            axes.set_xlabel(AXES[x])
    return layout.figure


def value_label(point: Point) -> str:
    """The vertical axis' label: the metric, and its unit or direction."""
    metric = point.metric.split(",")[0]
    if point.is_accuracy:
        return f"{metric}, %"
    return metric if point.higher_is_better else f"{metric}\n(lower is better)"


def _columns(panels: int) -> int:
    if panels <= 3:
        return panels
    return 2 if panels == 4 else 3 if panels in (5, 6, 9) else PANEL_COLUMNS


def _place(point: Point, x: str) -> float | None:
    if x == "window":
        return math.nan if point.window is None else float(point.window)
    if x == "mean_keys":
        return point.mean_keys
    if x == "seconds":
        return point.seconds
    share = point.visited_share if x == "visited" else point.flops_share
    return None if share is None else 100.0 * share


def _draw_panel(axes: Axes, points: Sequence[Point], x: str, comparison: Comparison) -> None:
    drawn = curves(points, x)
    styles = series_styles(comparison.series)
    swept = [
        s
        for s in comparison.series
        if any(p.window is not None for p in comparison.points if p.series == s)
    ]
    for curve in drawn:
        style = styles[curve.series]
        if curve.window == (None,):
            draw_baseline(axes, curve, style)
            continue
        shift = 1.0
        if x == "window":
            step = min(DODGE, DODGE_SPAN / max(len(swept) - 1, 1))
            shift = 2.0 ** (step * (swept.index(curve.series) - (len(swept) - 1) / 2))
        _draw_curve(axes, curve, style, shift)
    finish_panel(axes, points[0], drawn, 2 if x == "window" else 10)


def finish_panel(axes: Axes, point: Point, drawn: Sequence[Curve], base: int) -> None:
    """Chance, scales, ticks and grid of a panel; ``point``: any of its points."""
    scale_x(axes, [place for curve in drawn for place in curve.x if not math.isnan(place)], base)
    if point.higher_is_better and point.chance is not None:
        axes.axhline(
            100 * point.chance, color=CHANCE_COLOUR, linestyle=":", linewidth=1.4, zorder=1
        )
    values = [pair for curve in drawn for pair in zip(curve.y, curve.error, strict=True)]
    if not point.higher_is_better and all(value > 0 for value, _ in values):
        scale_log_y(axes, values)
    if point.is_accuracy:
        keep_points_apart(axes)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)


def draw_baseline(axes: Axes, curve: Curve, style: Style) -> None:
    """A line across the panel with a band of one standard error, and a point if it has a place."""
    value, error = curve.y[0], curve.error[0]
    axes.axhline(value, color=style.colour, linestyle=style.line, linewidth=1.4, zorder=2)
    if error:
        axes.axhspan(value - error, value + error, color=style.colour, alpha=0.07, linewidth=0)
    if not math.isnan(curve.x[0]):
        axes.plot(
            curve.x,
            curve.y,
            color=style.colour,
            marker=style.marker,
            markersize=14,
            linestyle="none",
            zorder=2.5,
        )


def _draw_curve(axes: Axes, curve: Curve, style: Style, shift: float) -> None:
    places = [place * shift for place in curve.x]
    axes.plot(places, curve.y, color=style.colour, linestyle=style.line, linewidth=1.6, zorder=3)
    axes.errorbar(
        places,
        curve.y,
        yerr=curve.error,
        color=style.colour,
        fmt="none",
        elinewidth=1.0,
        capsize=2.5,
        alpha=0.75,
        zorder=3,
    )
    for place, value, hollow in zip(places, curve.y, curve.saturated, strict=True):
        axes.plot(
            [place],
            [value],
            color=style.colour,
            marker=style.marker,
            markersize=MARKER_SIZE,
            markerfacecolor="white" if hollow else style.colour,
            markeredgewidth=1.4,
            linestyle="none",
            zorder=4,
        )
