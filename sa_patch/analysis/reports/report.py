"""What an analysis hands back: numbers for a file, a figure, and rows for the screen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sa_patch.patterns import ByHead, Pattern, parts_of
from sa_patch.patterns.registry import parameters


@dataclass(frozen=True)
class Report:
    """One question answered.

    Args:
        name: of its files.
        content: what was asked and what was found, as JSON holds it.
        columns, rows: a table of the main numbers, as text.
        note: what a reader of the table must know.
    """

    name: str
    content: dict[str, Any]
    figure: Figure
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def _repr_markdown_(self) -> str:
        """The table and its note, where a notebook shows them; the figure is shown by itself."""
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table


def as_json(value: Any, digits: int = 6) -> Any:
    """Dataclasses, arrays, patterns and numbers as JSON holds them.

    Fractions are rounded to that many significant digits; what is no finite number becomes None.
    """
    if isinstance(value, Pattern):
        return str(value)
    if dataclasses.is_dataclass(value):
        pairs = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {name: as_json(own, digits) for name, own in pairs}
    if isinstance(value, Mapping):
        return {name: as_json(own, digits) for name, own in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [as_json(own, digits) for own in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def short(pattern: Pattern) -> str:
    """A pattern's text form with as little as reads back: ``sinks:4+swa:60``, ``sa:64,seed=1``."""
    if isinstance(pattern, ByHead):
        return pattern.text(short)
    return "+".join(map(_short_part, parts_of(pattern)))


def _short_part(part: Pattern) -> str:
    name, colon, rest = str(part).partition(":")
    first, equals, value = rest.partition("=")
    # Only the values of the first parameters may stand without their names.
    if equals and first == parameters(type(part))[0]:
        rest = value
    pieces = [piece for piece in rest.split(",") if piece != "seed=0"]
    return name + colon + ",".join(pieces)


def shown(value: float | None, digits: int = 3) -> str:
    """A number as a table shows it, a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    whole = abs(value) >= 10**digits or value == int(value)
    return f"{value:,.0f}" if whole and abs(value) < 1e6 else f"{value:,.{digits}g}"
