"""How the figures of analyses look: colours, panels, legends and notes that never overlap."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.figures.layout import FONT as FONT
from sa_patch.figures.layout import MARGIN, NOTE_COLOUR, write_words
from sa_patch.patterns import Full, Pattern

MARKERS = "osD^vP*Xh"
_ROW, _NOTE, _TITLE = 0.2, 0.165, 0.26  # inches per line of legend, notes and title


def colours_of(patterns: Sequence[Pattern]) -> list[str]:
    """A colour for each pattern: its method's own, and others for compositions and repeats."""
    spare = iter(OTHER_COLOURS * (1 + len(patterns) // len(OTHER_COLOURS)))
    taken: list[str] = []
    for pattern in patterns:
        own = FULL_COLOUR if isinstance(pattern, Full) else COLOURS.get(pattern.name)
        taken.append(next(spare) if own is None or own in taken else own)
    return taken


class Sheet:
    """A figure of equal panels under a title, with a legend and notes below them, in inches."""

    def __init__(
        self,
        title: str,
        notes: Sequence[str],
        handles: Sequence[Line2D],
        shape: tuple[int, int],
        size: tuple[float, float] = (3.9, 2.9),
    ) -> None:
        """
        Args:
            handles: what the legend holds.
            shape: rows and columns of panels.
            size: width and height of a panel with its labels.
        """
        rows, columns = shape
        width = max(columns * size[0], 6.0)
        titles = textwrap.wrap(title, int(width * 9.2))
        lines = [line for note in notes for line in textwrap.wrap(note, int(width * 15))]
        longest = max((len(str(handle.get_label())) for handle in handles), default=1)
        legend_columns = max(1, min(len(handles), int(width / (0.072 * longest + 0.75))))
        legend_rows = -(-len(handles) // legend_columns)
        head = 0.15 + _TITLE * len(titles)
        foot = 0.12 + _NOTE * len(lines)
        legend = _ROW * legend_rows + 0.1
        height = head + rows * size[1] + legend + foot
        self.figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
        FigureCanvasAgg(self.figure)
        engine: Any = self.figure.get_layout_engine()
        low = (foot + legend) / height
        engine.set(rect=(0, low, 1, 1 - low - head / height), w_pad=0.08, h_pad=0.08)
        self.panels: list[Axes] = list(self.figure.subplots(rows, columns, squeeze=False).flat)
        write_words(self.figure, titles, lines)
        placed = self.figure.legend(
            handles=handles,
            loc="upper left",
            ncols=legend_columns,
            frameon=False,
            fontsize=FONT,
            borderaxespad=0,
            borderpad=0,
            handlelength=2.6,
            bbox_to_anchor=(MARGIN / width, low),
        )
        # Its place is fixed above: constrained layout must not make room for it again.
        placed.set_in_layout(False)


def plain(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels, grid and spines of a panel."""
    axes.set_title(title, fontsize=FONT + 0.5, loc="left")
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def sample(label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, **{"color": NOTE_COLOUR, **look})


def whole_ticks(axes: Axes, longest: int) -> None:
    """Round numbers on a logarithmic horizontal axis from 1 to `longest`, written out."""
    places = [p for e in range(7) for p in (10**e, 2 * 10**e, 5 * 10**e) if p <= longest]
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
