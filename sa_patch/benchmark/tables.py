"""Numbers, tables and lines of a benchmark as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from sa_patch.benchmark.record import STATUSES, C

Say = Callable[[str], None]
"""Takes a line of progress or of results."""
say_line: Say = partial(print, flush=True)


def number(value: float) -> str:
    """Three figures: ``0.0123``, ``4.56``, ``789``, ``12,345``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def spread(low: float, high: float) -> str:
    """``1.20 to 1.40``"""
    return f"{number(low)} to {number(high)}"


def table(columns: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        columns: names between bars; those that begin with ``>`` are aligned to the right.
        rows: of as many texts.
    """
    names = [name.strip() for name in columns.split("|")]
    rule = ["---:" if name.startswith(">") else "---" for name in names]
    lines = [[name.removeprefix(">") for name in names], rule]
    lines += [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def ordered(cells: Sequence[C]) -> list[C]:
    """The fastest first; cells without a time at the end, by status."""
    return sorted(cells, key=lambda cell: (STATUSES.index(cell.status), cell.median_ms or 0.0))
