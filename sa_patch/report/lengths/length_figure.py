"""Scores against length, beside the share of full attention's FLOPs that they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.figures.axes import scale_x
from sa_patch.figures.layout import FONT, MARKER_SIZE, Caption, Layout
from sa_patch.report.aggregate import Comparison
from sa_patch.report.lengths.by_length import ByLength, Row, row_name
from sa_patch.report.series_style import LINE_STYLES, Style, series_styles

COLUMNS = 4
PANEL = (2.6, 2.0)  # inches


def draw_lengths(found: ByLength, comparison: Comparison, caption: Caption) -> Figure:
    """The average and its cost, then a panel for each task; a line for each pattern."""
    styles = _styles(found, comparison)
    handles = [
        Line2D(
            [],
            [],
            label=row_name(row),
            color=style.colour,
            marker=style.marker,
            markersize=MARKER_SIZE,
            linestyle=style.line,
            linewidth=1.6,
        )
        for row, style in styles.items()
    ]
    panels: list[tuple[str, str, dict[Row, Mapping[int, float]]]] = []
    if any(map(found.shared, found.lengths)):
        panels += [
            ("average of all tasks", "score, %", {row: found.averages(row) for row in found.rows}),
            ("its cost", "attention FLOPs, % of full", {r: found.shares(r) for r in found.rows}),
        ]
    panels += [
        (task, "score, %", {row: found.scores(row, task) for row in found.rows})
        for task in found.tasks
    ]
    columns = min(len(panels), COLUMNS)
    shape = (math.ceil(len(panels) / columns), columns)
    layout = Layout(caption, handles, shape, PANEL, panel_titles=True, left=0.75, gap=0.85)
    for index, (title, label, lines) in enumerate(panels):
        axes = layout.panel(index)
        _draw_panel(axes, lines, styles)
        axes.set_title(title, fontsize=FONT + 1, loc="left")
        axes.set_ylabel(label)
        axes.set_xlabel("length, tokens")
    return layout.figure


def _styles(found: ByLength, comparison: Comparison) -> dict[Row, Style]:
    """A series' look, with another line for each of its windows."""
    looks = series_styles(comparison.series)
    seen: dict[object, int] = {}
    styles = {}
    for row in found.rows:
        look, place = looks[row[0]], seen.get(row[0], 0)
        seen[row[0]] = place + 1
        line = look.line if not place else LINE_STYLES[place % len(LINE_STYLES)]
        styles[row] = Style(look.colour, look.marker, line)
    return styles


def _draw_panel(
    axes: Axes, lines: Mapping[Row, Mapping[int, float]], styles: Mapping[Row, Style]
) -> None:
    for row, values in lines.items():
        style = styles[row]
        axes.plot(
            list(values),
            [100 * value for value in values.values()],
            color=style.colour,
            marker=style.marker,
            markersize=MARKER_SIZE,
            linestyle=style.line,
            linewidth=1.6,
            # Where lines lie on each other, both are seen.
            alpha=0.85,
        )
    scale_x(axes, [float(length) for values in lines.values() for length in values], 2)
    axes.set_ylim(-4, 104)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)
