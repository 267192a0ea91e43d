"""Repeated trainings: mean and deviation as numbers and text, and how figures show them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.figures.layout import FONT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_GATED_COLOUR = OTHER_COLOURS[1]
_OWN_COLOURS = {"full": FULL_COLOUR, "dot": FULL_COLOUR, "gated": _GATED_COLOUR, **COLOURS}
_MARKERS = "osD^vPX"

Look = tuple[str, str]
"""Colour and marker."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value), and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def spread_text(spread: Mapping[str, Any] | None, digits: int, scale: float = 1.0) -> str:
    """Such as ``12.3 ± 0.4``, multiplied by `scale`; a dash for None."""
    if spread is None:
        return "-"
    text = f"{spread['mean'] * scale:.{digits}f}"
    if spread["deviation"] is None:
        return text
    return f"{text} ± {spread['deviation'] * scale:.{digits}f}"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each method or attention, in all figures of a comparison."""
    own = {name: _OWN_COLOURS.get(name.partition(":")[0]) for name in names}
    others = cycle(colour for colour in OTHER_COLOURS if colour not in own.values())
    found: dict[str, Look] = {}
    for index, (name, colour) in enumerate(own.items()):
        used = {look[0] for look in found.values()}
        chosen = colour if colour and colour not in used else next(others)
        found[name] = (chosen, _MARKERS[index % len(_MARKERS)])
    return found


def legend(looks: Mapping[str, Look], **style: Any) -> list[Line2D]:
    """What a `Layout` shows as legend; `style` is that of the lines."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], label=name, color=colour, marker=marker, **style)
        for name, (colour, marker) in looks.items()
    ]


def draw_spread(
    axes: Axes,
    places: Sequence[float],
    spreads: Sequence[Mapping[str, Any]],
    look: Look,
    scale: float = 1.0,
    **style: Any,
) -> None:
    """Points at the means with bars of one deviation; joined where `style` has a linestyle."""
    axes.errorbar(
        places,
        [scale * one["mean"] for one in spreads],
        yerr=[scale * (one["deviation"] or 0.0) for one in spreads],
        color=look[0],
        marker=look[1],
        **{"markersize": 5, "capsize": 3, "linestyle": "none", **style},
    )


def label_axes(axes: Axes, title: str, x: str, y: str, size: float = FONT + 1) -> None:
    """A panel's title, of the given font size, and labels."""
    axes.set_title(title, fontsize=size, loc="left")
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
