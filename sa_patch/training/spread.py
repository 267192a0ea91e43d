"""Mean and deviation over repeated trainings: as numbers, as text, and as points of a figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sa_patch.figures.layout import FONT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value), and the values themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def spread_text(spread: Mapping[str, Any], digits: int, scale: float = 1.0) -> str:
    """Such as ``12.3 ± 0.4``, multiplied by `scale`."""
    text = f"{spread['mean'] * scale:.{digits}f}"
    if spread["deviation"] is None:
        return text
    return f"{text} ± {spread['deviation'] * scale:.{digits}f}"


def draw_spread(
    axes: Axes,
    x: float,
    spread: Mapping[str, Any],
    look: tuple[str, str],
    scale: float = 1.0,
) -> None:
    """A point at the mean with bars of one deviation; `look` is its colour and marker."""
    axes.errorbar(
        [x],
        [scale * spread["mean"]],
        yerr=[scale * (spread["deviation"] or 0.0)],
        color=look[0],
        marker=look[1],
        markersize=5,
        capsize=3,
        linestyle="none",
    )


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """A panel's title and labels, in the size that all figures of training have."""
    axes.set_title(title, fontsize=FONT + 1, loc="left")
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)
