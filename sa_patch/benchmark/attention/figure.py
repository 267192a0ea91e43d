"""The figure of a benchmark: time against length, log-log, one panel for each window."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from sa_patch.benchmark import figure
from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell
from sa_patch.benchmark.attention.tables import machine_line, shape_line
from sa_patch.benchmark.figure import Line, Panel
from sa_patch.files.png import png


def lines(cells: Sequence[AttentionCell]) -> list[Line]:
    """The timed cells by contestant, slowest at its longest length first."""
    found: dict[tuple[str, str], list[AttentionCell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.n):
        if cell.quartiles_ms is not None:
            found.setdefault((cell.label, cell.backend), []).append(cell)
    return figure.slowest_first([_line(own) for own in found.values()])


def panels(bench: AttentionBench) -> dict[int | None, list[Line]]:
    """The lines of each window's panel; what has no window is in all of them."""
    windows = sorted({cell.window for cell in bench.cells if cell.window is not None})
    places: list[int | None] = [*windows] or [None]
    return {
        window: lines([cell for cell in bench.cells if cell.window in (window, None)])
        for window in places
    }


def draw(bench: AttentionBench) -> Figure:
    """Time against length; each panel's legend stands beside it in the order of the lines' ends."""
    row = [
        Panel(
            "" if window is None else f"window {window}",
            "milliseconds a call, median and quartiles",
            drawn,
        )
        for window, drawn in panels(bench).items()
    ]
    title = f"Attention of one layer: {machine_line(bench)}\n{shape_line(bench)}"
    return figure.draw([row], title)


def figure_bytes(bench: AttentionBench) -> bytes:
    """The figure as PNG."""
    return png(draw(bench))


def _line(own: Sequence[AttentionCell]) -> Line:
    one, spreads = own[0], [cell.quartiles_ms or (0.0, 0.0) for cell in own]
    baseline = one.backend == "torch"
    return Line(
        one.label if baseline else f"{one.label}, {one.backend}",
        tuple(cell.n for cell in own),
        tuple(cell.median_ms or 0.0 for cell in own),
        tuple(low for low, _ in spreads),
        tuple(high for _, high in spreads),
        figure.look(one.method, one.backend, rival=one.rival, baseline=baseline),
    )
