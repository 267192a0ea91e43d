"""The figure of a prefill benchmark: time, and the share of attention, against the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sa_patch.benchmark import figure
from sa_patch.benchmark.figure import Line, Panel
from sa_patch.benchmark.prefill.parts import CORE
from sa_patch.benchmark.prefill.record import Prefill, PrefillBench
from sa_patch.benchmark.prefill.tables import REHEARSAL, machine_line
from sa_patch.files.png import png

Values = Callable[[Prefill], Sequence[float]]


def figure_bytes(bench: PrefillBench) -> bytes:
    """The figure as PNG: a row for each model, seconds and beside them attention's share."""
    rows = []
    for model in bench.models:
        setups: dict[str, list[Prefill]] = {}
        for one in sorted(bench.cells, key=lambda cell: cell.n):
            if one.model == model and one.median is not None:
                setups.setdefault(one.name, []).append(one)
        if setups:
            rows.append(_row(model, list(setups.values())))
    title = f"Prefill of one prompt{f': {REHEARSAL}' if bench.options['small'] else ''}"
    return png(figure.draw(rows, f"{title}\n{machine_line(bench)}"))


def _row(model: str, setups: Sequence[Sequence[Prefill]]) -> list[Panel]:
    def lines(values: Values) -> list[Line]:
        return figure.slowest_first([_line(cells, values) for cells in setups])

    seconds = lines(lambda one: (one.median or 0.0, min(one.seconds), max(one.seconds)))
    shares = lines(lambda one: 3 * (100 * one.parts[CORE] / sum(one.parts.values()),))
    return [
        Panel(model, "seconds, median and range", seconds, legend=False),
        Panel("", "attention, % of a pass", shares, percent=True),
    ]


def _line(cells: Sequence[Prefill], values: Values) -> Line:
    one = cells[0]
    stock = not one.backend
    method = "composed" if "+" in one.label else one.label.partition(":")[0]
    middle, low, high = zip(*(values(cell) for cell in cells), strict=True)
    shown = figure.look(method, one.backend, rival=one.full, baseline=stock)
    return Line(one.name, tuple(cell.n for cell in cells), middle, low, high, shown)
