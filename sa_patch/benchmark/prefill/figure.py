"""The figure of a prefill benchmark: time, and the share of attention, against the prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sa_patch.benchmark.prefill.parts import CORE
from sa_patch.benchmark.prefill.record import Prefill, PrefillBench
from sa_patch.benchmark.prefill.tables import REHEARSAL, machine_line
from sa_patch.figures.axes import scale_log_y, scale_x
from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS

FONT = 9.0
PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.4  # inches
LEFT, BOTTOM, TOP, GAP = 0.8, 0.65, 0.6, 0.75
LEGEND_CHARACTER = 0.073  # inches of a legend's text at this font
# The line says the backend; stock attention's is solid and thick.
LINES = {"triton": "-", "flash": "-.", "auto": "-", "banded": (0, (6, 2)), "flex": (0, (3, 1))}


def figure_bytes(bench: PrefillBench) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    draw(bench).savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def draw(bench: PrefillBench) -> Figure:
    """A row for each model: seconds on the left, attention's share of them on the right."""
    timed = [one for one in bench.prefills if one.seconds]
    models = [name for name in bench.models if any(one.model == name for one in timed)]
    legend = 0.6 + LEGEND_CHARACTER * max(len(one.name) for one in timed)
    width = LEFT + 2 * PANEL_WIDTH + GAP + legend
    row = BOTTOM + PANEL_HEIGHT + 0.35
    height = row * len(models) + TOP
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    for index, model in enumerate(models):
        lines = _lines(bench, model)
        bottom = (height - TOP - row * (index + 1) + BOTTOM) / height
        for column in range(2):
            left = (LEFT + column * (PANEL_WIDTH + GAP)) / width
            axes = figure.add_axes((left, bottom, PANEL_WIDTH / width, PANEL_HEIGHT / height))
            (_draw_seconds if column == 0 else _draw_share)(axes, lines)
            _length_axis(axes, bench.lengths(model))
            if column == 0:
                axes.set_title(model, fontsize=FONT + 1, loc="left", fontweight="bold")
            else:
                axes.legend(
                    loc="upper left",
                    bbox_to_anchor=(1.02, 1.0),
                    frameon=False,
                    fontsize=FONT,
                    borderaxespad=0,
                    handlelength=3.0,
                )
    words = "Prefill of one prompt"
    words += f": {REHEARSAL}" if bench.options["small"] else ""
    place: dict[str, Any] = {"va": "top", "fontsize": FONT + 1}
    figure.text(0.15 / width, 1 - 0.12 / height, words, fontweight="bold", **place)
    figure.text(0.15 / width, 1 - 0.34 / height, machine_line(bench), va="top", fontsize=FONT)
    return figure


def _lines(bench: PrefillBench, model: str) -> list[list[Prefill]]:
    """The timed cells by setup, slowest at its longest prompt first."""
    found: dict[str, list[Prefill]] = {}
    for one in sorted(bench.prefills, key=lambda cell: cell.n):
        if one.model == model and one.seconds:
            found.setdefault(one.name, []).append(one)
    return sorted(found.values(), key=lambda cells: (-cells[-1].n, -(cells[-1].median or 0.0)))


def _draw_seconds(axes: Axes, lines: Sequence[Sequence[Prefill]]) -> None:
    reached: list[tuple[float, float]] = []
    for cells in lines:
        lengths = [one.n for one in cells]
        axes.plot(lengths, [one.median or 0.0 for one in cells], **_look(cells[0]))
        low, high = [min(one.seconds) for one in cells], [max(one.seconds) for one in cells]
        reached += [(min(low), 0.0), (max(high), 0.0)]
        axes.fill_between(lengths, low, high, color=_colour(cells[0]), alpha=0.15, linewidth=0)
    scale_log_y(axes, reached)
    axes.set_ylabel("seconds, median and range", fontsize=FONT)


def _draw_share(axes: Axes, lines: Sequence[Sequence[Prefill]]) -> None:
    for cells in lines:
        shares = [100 * one.parts[CORE] / sum(one.parts.values()) for one in cells]
        axes.plot([one.n for one in cells], shares, label=cells[0].name, **_look(cells[0]))
    axes.set_ylim(0, 100)
    axes.set_ylabel("attention, % of a pass", fontsize=FONT)


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    scale_x(axes, lengths, 2)
    axes.set_xlabel("tokens of the prompt", fontsize=FONT)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)


def _look(cell: Prefill) -> dict[str, Any]:
    stock = not cell.backend
    return {
        "color": _colour(cell),
        "linestyle": "-" if stock else LINES.get(cell.backend, ":"),
        "linewidth": 2.4 if stock else 1.5,
        "marker": "*" if stock else "o",
        "markersize": 8 if stock else 4.5,
        "zorder": 2 if stock else 3,
    }


def _colour(cell: Prefill) -> str:
    if not cell.backend:
        return FULL_COLOUR
    if cell.full:
        return "#7F7F7F"
    name = cell.label.partition(":")[0]
    return OTHER_COLOURS[0] if "+" in cell.label else COLOURS.get(name, OTHER_COLOURS[1])
