"""How a series looks in figures: its colour, marker and line.

Each method keeps its colour in every figure, and parameter variants of a method differ in line
style and marker.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.lines import Line2D

from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.figures.layout import MARKER_SIZE, LineStyle
from sa_patch.report.aggregate import Comparison
from sa_patch.report.series import Series

MARKERS = {"sa": "o>h8", "swa": "sDpP", "moba": "^v<d", "psa": "8h>o", "block_topk": "DPsX"}
OTHER_MARKERS = "XPd^ovs<p>hD"
LINE_STYLES: tuple[LineStyle, ...] = ("-", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
FULL_LINE_STYLES: tuple[LineStyle, ...] = ((0, (5, 3)), (0, (2, 2)), (0, (8, 2, 2, 2)))
CHANCE_COLOUR = "#8C8C8C"


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
