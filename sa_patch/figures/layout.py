"""How a figure is laid out: title, legend, panels and notes, none of which ever overlap."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

FONT = 9.0
MARKER_SIZE = 6.5
LineStyle = str | tuple[int, tuple[int, ...]]
NOTE_COLOUR = "#404040"
MARGIN = 0.15  # inches to the left of words
LEGEND_HANDLE, LEGEND_GAP = 3.2, 1.6  # in units of the font size


def write_words(figure: Figure, title: Sequence[str], notes: Sequence[str]) -> None:
    """Write lines of a title in the upper left corner, and lines of notes in the lower left one.

    Whoever draws the rest leaves them room.
    """
    width, height = figure.get_size_inches()
    left = MARGIN / width
    figure.text(
        left,
        1 - 0.12 / height,
        "\n".join(title),
        va="top",
        fontsize=FONT + 3,
        fontweight="bold",
    )
    figure.text(
        left,
        0.1 / height,
        "\n".join(notes),
        va="bottom",
        fontsize=FONT - 1,
        color=NOTE_COLOUR,
        linespacing=1.35,
    )


@dataclass(frozen=True)
class Caption:
    """What a figure says in words: ``title`` above it and ``notes`` (one sentence each) below."""

    title: str
    notes: Sequence[str]


class Layout:
    """Places title, legend, panels and notes in inches, so that none of them ever overlap."""

    RIGHT = 0.2  # inches beside the panels
    GAP_Y = 0.75  # inches between rows of panels: x labels and titles
    TITLE, ROW, NOTE = 0.25, 0.21, 0.155  # inches per line of title, legend and notes

    def __init__(
        self,
        caption: Caption,
        handles: Sequence[Line2D],
        shape: tuple[int, int],
        size: tuple[float, float],
        *,
        panel_titles: bool,
        left: float = 1.0,
        gap: float = 1.15,
    ) -> None:
        """``handles``: what the legend holds. ``shape``: rows and columns of panels, each ``size``
        (width, height) inches inside. ``left``, ``gap``: inches for the labels to the left of the
        first panel and between two."""
        self.rows, self.columns = shape
        inner = self.columns * size[0] + (self.columns - 1) * gap
        width = left + inner + self.RIGHT
        title = textwrap.wrap(caption.title, int((width - 0.3) * 9.5))
        notes = [
            line
            for note in caption.notes
            for line in textwrap.wrap(note, int(width * 15.5), subsequent_indent="   ")
        ]
        legend_columns = _legend_columns(
            [str(handle.get_label()) for handle in handles], width - 0.3
        )
        legend_rows = math.ceil(len(handles) / max(legend_columns, 1))
        legend_top = 0.2 + self.TITLE * len(title)
        head = legend_top + self.ROW * legend_rows + (0.42 if panel_titles else 0.2)
        foot = 0.65 + self.NOTE * len(notes) + 0.1
        height = head + self.rows * size[1] + (self.rows - 1) * self.GAP_Y + foot
        self.figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
        FigureCanvasAgg(self.figure)
        self._grid = self.figure.add_gridspec(
            self.rows,
            self.columns,
            left=left / width,
            right=1 - self.RIGHT / width,
            top=1 - head / height,
            bottom=foot / height,
            wspace=gap / size[0],
            hspace=self.GAP_Y / size[1],
        )
        write_words(self.figure, title, notes)
        if handles:
            self.figure.legend(
                handles=handles,
                loc="upper left",
                ncols=legend_columns,
                frameon=False,
                fontsize=FONT,
                borderaxespad=0,
                borderpad=0,
                handlelength=LEGEND_HANDLE,
                columnspacing=LEGEND_GAP,
                bbox_to_anchor=(MARGIN / width, 1 - legend_top / height),
            )

    def panel(self, index: int) -> Axes:
        return self.figure.add_subplot(self._grid[index // self.columns, index % self.columns])


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """The most columns that fit ``width`` inches; legends fill column by column."""
    for columns in range(len(labels), 1, -1):
        rows = math.ceil(len(labels) / columns)
        if math.ceil(len(labels) / rows) != columns:
            continue
        longest = [max(map(len, labels[i : i + rows])) for i in range(0, len(labels), rows)]
        extra = (LEGEND_HANDLE + LEGEND_GAP + 0.8) * FONT / 72
        if sum(0.078 * length + extra for length in longest) <= width:
            return columns
    return min(len(labels), 1)
