"""Figures of a benchmark: panels of lines over the length, each legend beside its panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sa_patch.figures.axes import scale_log_y, scale_x
from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.figures.layout import FONT, MARKER_SIZE, LineStyle

PANEL_WIDTH, PANEL_HEIGHT = 5.3, 4.6  # inches, axis labels and title counted
TITLE_HEIGHT, LEGEND_ROW = 0.6, 0.2
LEGEND_CHARACTER = 0.073  # inches of a legend's text at this font
RIVAL_COLOUR = "#7F7F7F"
# A backend has one look in every figure; the colour says the method.
LOOKS: dict[str, tuple[str, LineStyle]] = {
    "triton": ("o", "-"),
    "auto": ("o", "-"),
    "banded": ("s", (0, (6, 2))),
    "flash": ("^", "-."),
    "flex": ("D", (0, (3, 1))),
    "reference": ("x", ":"),
}
OTHER_LOOK: tuple[str, LineStyle] = ("v", (0, (6, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Line:
    """One contestant as drawn: ``n`` ascending, ``values`` and what they lie between."""

    label: str
    n: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    look: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """Lines over the length, on logarithmic scales, or in percent from 0 to 100."""

    title: str
    y_label: str
    lines: Sequence[Line] = field(default_factory=tuple)
    percent: bool = False
    legend: bool = True


def look(method: str, backend: str, *, rival: bool, baseline: bool) -> dict[str, Any]:
    """How a line looks: thick for rivals, the darkest for the baseline."""
    marker, style = LOOKS.get(backend, OTHER_LOOK)
    if rival:
        colour = FULL_COLOUR if baseline else RIVAL_COLOUR
        marker, style = "*", "-"
    else:
        colour = COLOURS.get(method, OTHER_COLOURS[0 if method == "full" else 1])
    return {
        "color": colour,
        "marker": marker,
        "markersize": MARKER_SIZE + (2.5 if rival else -1),
        "linestyle": style,
        "linewidth": 2.2 if rival else 1.4,
        "zorder": 2 if rival else 3,
    }


def slowest_first(lines: Sequence[Line]) -> list[Line]:
    """In the order of their ends, so that a legend reads like the lines beside it."""
    return sorted(lines, key=lambda line: (-line.n[-1], -line.values[-1]))


def draw(rows: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Rows of panels under a title."""
    panels = [panel for row in rows for panel in row]
    longest = max((len(line.label) for panel in panels for line in panel.lines), default=0)
    legends = max(sum(panel.legend for panel in row) for row in rows)
    width = PANEL_WIDTH * len(rows[0]) + (0.6 + LEGEND_CHARACTER * longest) * legends
    height = max(PANEL_HEIGHT, LEGEND_ROW * max(len(panel.lines) for panel in panels) + 0.8)
    figure = Figure(
        figsize=(width, TITLE_HEIGHT + height * len(rows)),
        dpi=150,
        facecolor="white",
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=FONT + 1, fontweight="bold")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        _draw_panel(axes, panel)
    figure.draw_without_rendering()  # places panels and legends
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for line in panel.lines:
        axes.plot(line.n, line.values, label=line.label, **line.look)
        shade = {"color": line.look["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(line.n, line.low, line.high, **shade)
    lengths = sorted({n for line in panel.lines for n in line.n})
    scale_x(axes, lengths, 2)
    axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    if panel.percent:
        axes.set_ylim(0, 100)
    elif panel.lines:
        scale_log_y(axes, [(v, 0.0) for line in panel.lines for v in (*line.low, *line.high)])
    axes.set_title(panel.title, fontsize=FONT + 1, loc="left")
    axes.set_xlabel("tokens", fontsize=FONT)
    axes.set_ylabel(panel.y_label, fontsize=FONT)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)
    if panel.legend:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            frameon=False,
            fontsize=FONT - 0.5,
            borderaxespad=0,
            handlelength=3.0,
        )
