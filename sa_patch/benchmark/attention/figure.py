"""The figure of a benchmark: time against length, log-log, one panel for each window."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from sa_patch.benchmark.attention.record import Bench, Cell
from sa_patch.benchmark.attention.tables import threads_text
from sa_patch.figures.axes import log_ticks, tick_text
from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.figures.layout import FONT, MARKER_SIZE, LineStyle

PANEL_WIDTH, PANEL_HEIGHT = 4.6, 4.2  # inches
LEFT, RIGHT, BOTTOM, TOP, GAP = 0.8, 0.2, 0.6, 0.9, 0.95
LEGEND_CHARACTER = 0.073  # inches of a legend's text at this font
RIVAL_COLOUR = "#7F7F7F"
# A backend has one look in every figure; the colour says the method.
LOOKS: dict[str, tuple[str, LineStyle]] = {
    "triton": ("o", "-"),
    "banded": ("s", (0, (6, 2))),
    "flash": ("^", "-."),
    "flex": ("D", (0, (3, 1))),
    "reference": ("x", ":"),
}
OTHER_LOOK: tuple[str, LineStyle] = ("v", (0, (6, 1, 1, 1, 1, 1)))


@dataclass(frozen=True)
class Line:
    """One contestant as drawn: ``n`` ascending, ``ms`` and its quartiles."""

    label: str
    backend: str
    method: str
    rival: bool
    n: tuple[int, ...]
    ms: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def lines(cells: Sequence[Cell]) -> list[Line]:
    """The timed cells by contestant, slowest at its longest length first."""
    found = []
    for label, backend in dict.fromkeys((c.label, c.backend) for c in cells):
        own = sorted(
            (c for c in cells if (c.label, c.backend) == (label, backend) and c.samples_ms),
            key=lambda c: c.n,
        )
        points = [(c.n, c.median_ms, c.quartiles_ms) for c in own]
        timed = [(n, ms, spread) for n, ms, spread in points if ms is not None and spread]
        if timed:
            found.append(
                Line(
                    label,
                    backend,
                    own[0].method,
                    own[0].rival,
                    tuple(n for n, _, _ in timed),
                    tuple(ms for _, ms, _ in timed),
                    tuple(spread[0] for _, _, spread in timed),
                    tuple(spread[1] for _, _, spread in timed),
                )
            )
    return sorted(found, key=lambda line: (-line.n[-1], -line.ms[-1]))


def panels(bench: Bench) -> dict[int | None, list[Line]]:
    """The lines of each window's panel; what has no window is in all of them."""
    windows = sorted({cell.window for cell in bench.cells if cell.window is not None})
    if not windows:
        return {None: lines(bench.cells)}
    chosen: dict[int | None, list[Line]] = {}
    for window in windows:
        chosen[window] = lines([c for c in bench.cells if c.window in (window, None)])
    return chosen


def draw(bench: Bench) -> Figure:
    """Time against length; each panel's legend stands beside it in the order of the lines' ends."""
    chosen = panels(bench)
    longest = max((len(_name(one)) for drawn in chosen.values() for one in drawn), default=0)
    legend = 0.55 + LEGEND_CHARACTER * longest
    step = PANEL_WIDTH + legend + GAP
    width = LEFT + step * len(chosen) - GAP + RIGHT
    tallest = max(len(drawn) for drawn in chosen.values())
    inner = max(PANEL_HEIGHT, 0.2 * tallest + 0.1)
    height = BOTTOM + inner + TOP
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    for index, (window, drawn) in enumerate(chosen.items()):
        left = LEFT + index * step
        axes = figure.add_axes((left / width, BOTTOM / height, PANEL_WIDTH / width, inner / height))
        _draw_panel(axes, drawn)
        axes.set_title("" if window is None else f"window {window}", fontsize=FONT + 1, loc="left")
        if index == 0:
            axes.set_ylabel("milliseconds a call, median and quartiles")
        axes.set_xlabel("tokens n")
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.02, 1.0),
            frameon=False,
            fontsize=FONT - 0.5,
            borderaxespad=0,
            handlelength=3.0,
        )
    figure.text(
        0.15 / width,
        1 - 0.12 / height,
        _title(bench),
        va="top",
        fontsize=FONT + 1,
        fontweight="bold",
    )
    return figure


def figure_bytes(bench: Bench) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    draw(bench).savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(axes: Axes, drawn: Sequence[Line]) -> None:
    for line in drawn:
        marker, style = LOOKS.get(line.backend, OTHER_LOOK)
        colour = _colour(line)
        axes.plot(
            line.n,
            line.ms,
            color=colour,
            marker="*" if line.rival else marker,
            markersize=MARKER_SIZE + (2.5 if line.rival else -1),
            linestyle="-" if line.rival else style,
            linewidth=2.2 if line.rival else 1.4,
            label=_name(line),
            zorder=2 if line.rival else 3,
        )
        axes.fill_between(line.n, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = sorted({n for line in drawn for n in line.n})
    axes.set_xticks(places, [_length(n) for n in places])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    ticks = log_ticks(low, high, 9)
    axes.set_yticks(ticks, [tick_text(tick) for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT)


def _colour(line: Line) -> str:
    if line.rival:
        return FULL_COLOUR if line.backend == "torch" else RIVAL_COLOUR
    if line.method == "full":
        return OTHER_COLOURS[0]
    return COLOURS.get(line.method, OTHER_COLOURS[1])


def _name(line: Line) -> str:
    return line.label if line.backend == "torch" else f"{line.label}, {line.backend}"


def _length(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


def _title(bench: Bench) -> str:
    options, hardware = bench.options, bench.provenance["hardware"]
    machine = hardware["gpus"][0] if options["device"] == "cuda" else hardware["cpu"]
    where = machine if options["device"] == "cuda" else f"{machine}, {threads_text(bench)}"
    return (
        f"Attention of one layer: {where}\n{options['heads']} query and {options['kv_heads']} KV "
        f"heads of {options['head_dim']}, batch {options['batch']}, {options['dtype']}"
    )
