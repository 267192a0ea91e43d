"""How a figure looks: each series' colour, marker and line, and where everything is placed.

Each method keeps its colour in every figure, and parameter variants of a method differ in line
style and marker.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.figure_words import FONT as FONT
from sa_patch.figure_words import MARGIN, write_words
from sa_patch.harness.aggregate import Comparison
from sa_patch.harness.series import Series
from sa_patch.method_colours import COLOURS as COLOURS
from sa_patch.method_colours import FULL_COLOUR as FULL_COLOUR
from sa_patch.method_colours import OTHER_COLOURS as OTHER_COLOURS

MARKERS = {"sa": "o>h8", "swa": "sDpP", "moba": "^v<d", "psa": "8h>o", "block_topk": "DPsX"}
OTHER_MARKERS = "XPd^ovs<p>hD"
LineStyle = str | tuple[int, tuple[int, ...]]
LINE_STYLES: tuple[LineStyle, ...] = ("-", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
FULL_LINE_STYLES: tuple[LineStyle, ...] = ((0, (5, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))
MARKER_SIZE = 6.5
CHANCE_COLOUR = "#8C8C8C"
LEGEND_HANDLE, LEGEND_GAP = 3.2, 1.6  # in units of the font size


@dataclass(frozen=True)
class Caption:
    """What a figure says in words: ``title`` above it and ``notes`` (one sentence each) below."""

    title: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    line: LineStyle


def series_styles(series: Sequence[Series]) -> dict[Series, Style]:
    """A colour, marker and line style per series; no two series have the same three.

    A single method's colour never depends on the rest; a composition's does, by its methods.
    """
    others = sorted({s.family for s in series if s.family not in COLOURS and not s.is_full})
    variants: dict[str, int] = {}
    styles = {}
    for one in series:
        variant = variants.get(one.family, 0)
        variants[one.family] = variant + 1
        if one.is_full:
            colour, markers = FULL_COLOUR, "*"
        elif one.family in COLOURS:
            colour, markers = COLOURS[one.family], MARKERS[one.family]
        else:
            rank = others.index(one.family)
            colour = OTHER_COLOURS[rank % len(OTHER_COLOURS)]
            start = rank % len(OTHER_MARKERS)
            markers = OTHER_MARKERS[start:] + OTHER_MARKERS[:start]
        lines = FULL_LINE_STYLES if one.is_full else LINE_STYLES
        # The line changes again once the markers are used up, so that the pair repeats late.
        line = lines[(variant + variant // len(markers)) % len(lines)]
        styles[one] = Style(colour, markers[variant % len(markers)], line)
    return styles


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


def legend_handles(comparison: Comparison, full_has_place: bool) -> list[Line2D]:
    """Every series, then what hollow points and the dotted line mean, where there are any.

    ``full_has_place``: the axis gives full attention a point (a star) besides its line.
    """
    handles = []
    for series, style in series_styles(comparison.series).items():
        plain = series.is_full and not full_has_place
        handles.append(
            _sample(
                series.label,
                color=style.colour,
                marker="" if plain else style.marker,
                markersize=10 if series.is_full else MARKER_SIZE,
                linestyle=style.line,
                linewidth=1.6,
            )
        )
    if any(point.saturated for point in comparison.points):
        handles.append(
            _sample(
                "hollow: saturated (see note)",
                color="#404040",
                marker="o",
                markersize=MARKER_SIZE,
                markerfacecolor="white",
                markeredgewidth=1.4,
                linestyle="none",
            )
        )
    if any(point.chance is not None and point.higher_is_better for point in comparison.points):
        handles.append(_sample("chance", color=CHANCE_COLOUR, linestyle=":", linewidth=1.4))
    return handles


def _sample(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **look)
