"""RULER's table: a pattern's average by length, how far it keeps full attention's, task by task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.report.lengths.by_length import KEPT, ByLength, Row, kept_up_to, row_name

ROW_HEIGHT, CHARACTER = 0.24, 0.075  # inches


@dataclass(frozen=True)
class LengthTable:
    """Words ready to be set: ``title``, a heading for each column, and rows of cells."""

    title: str
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def length_tables(found: ByLength) -> list[LengthTable]:
    """The average's table first (if any task is shared by all patterns), then each task's."""
    tables = []
    if any(map(found.shared, found.lengths)):
        averages = {row: found.averages(row) for row in found.rows}
        tables.append(_table(found, f"Average of {averaged_tasks(found)}", averages))
    for task in found.tasks:
        scores = {row: found.scores(row, task) for row in found.rows}
        tables.append(_table(found, task, scores))
    return tables


def averaged_tasks(found: ByLength) -> str:
    """How many tasks an average is of; at each length where they differ."""
    counts = {length: len(found.shared(length)) for length in found.lengths}
    known = {count for count in counts.values() if count}
    if len(known) == 1:
        return _counted(known.pop())
    return ", ".join(f"{_counted(n)} at {length:,}" for length, n in counts.items() if n)


def _counted(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _table(found: ByLength, title: str, scores: Mapping[Row, Mapping[int, float]]) -> LengthTable:
    lengths = [length for length in found.lengths if any(length in own for own in scores.values())]
    shares = {row: found.shares(row) for row in found.rows}
    rows = []
    for row, own in scores.items():
        if not own:
            continue
        full = found.full_of(row)
        kept = "–" if full is None else _length(kept_up_to(own, scores[full]))
        mean = f"{100 * statistics.fmean(own.values()):.1f}" if set(own) == set(lengths) else "–"
        spent = shares[row].values()
        share = f"{100 * statistics.fmean(spent):.0f}" if spent else "–"
        cells = (f"{100 * own[length]:.1f}" if length in own else "–" for length in lengths)
        rows.append((row_name(row), *cells, mean, kept, share))
    heading = ("pattern", *(f"{length:,}" for length in lengths), "mean")
    last = (f"kept up to (≥ {100 * KEPT:.0f}% of full)", "FLOPs, % of full")
    return LengthTable(title, (*heading, *last), tuple(rows))


def _length(length: int | None) -> str:
    return "none" if length is None else f"{length:,}"


def markdown_length_tables(tables: list[LengthTable]) -> str:
    """The tables as Markdown, each under a heading of its own."""
    blocks = []
    for table in tables:
        lines = [f"### By length: {table.title}", ""]
        lines.append("| " + " | ".join(table.heading) + " |")
        lines.append("| --- |" + " ---: |" * (len(table.heading) - 1))
        lines += ["| " + " | ".join(cells) + " |" for cells in table.rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def draw_length_table(tables: list[LengthTable], caption: Caption) -> Figure:
    """The first table as a picture."""
    table = tables[0]
    every = [table.heading, *table.rows]
    widths = [
        CHARACTER * max(len(cells[column]) for cells in every) + 0.25
        for column in range(len(table.heading))
    ]
    size = (sum(widths), ROW_HEIGHT * len(every))
    layout = Layout(caption, [], (1, 1), size, panel_titles=True, left=0.2)
    axes = layout.panel(0)
    axes.set_axis_off()
    axes.set_title(table.title, fontsize=FONT + 1, loc="left")
    axes.set_xlim(0, size[0])
    axes.set_ylim(len(every), 0)
    for line, cells in enumerate(every):
        place = 0.0
        for column, (text, width) in enumerate(zip(cells, widths, strict=True)):
            left = column == 0
            axes.text(
                place if left else place + width - 0.1,
                line + 0.5,
                text,
                ha="left" if left else "right",
                va="center",
                fontsize=FONT,
                fontweight="bold" if line == 0 else "normal",
            )
            place += width
    axes.axhline(1, color="#404040", linewidth=0.8)
    return layout.figure
