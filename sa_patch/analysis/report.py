"""What an analysis hands back: numbers for a file, a figure, and rows for the screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """One question answered.

    Args:
        name: of its files.
        content: what was asked and what was found, as JSON holds it.
        columns, rows: a table of the main numbers, as text.
    """

    name: str
    content: dict[str, Any]
    figure: Figure
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def rounded(values: Sequence[float], digits: int = 6) -> list[float | None]:
    """Numbers with that many significant digits, None for what is no number."""
    return [rounded_one(value, digits) for value in values]


def rounded_one(value: float | None, digits: int = 6) -> float | None:
    """A number with that many significant digits, None for what is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


def shown(value: float | None, digits: int = 3) -> str:
    """A number as a table shows it, a dash for none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}g}"
