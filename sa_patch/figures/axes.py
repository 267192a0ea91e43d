"""Scales of a panel. Ticks on logarithmic axes are few, round, and written as plain numbers."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

# Height of an accuracy panel, at least, in percentage points.
MIN_ACCURACY_SPAN = 5.0

MULTIPLES: tuple[Sequence[float], ...] = (
    (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 2, 3, 5, 7),
    (1, 2, 5),
    (1, 3),
    (1,),
)


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round numbers within ``[low, high]``, as dense as that allows."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in MULTIPLES:
        ticks = [
            multiple * 10.0**power
            for power in range(first, last + 1)
            for multiple in multiples
            if low <= multiple * 10.0**power <= high
        ]
        if len(ticks) <= most:
            return ticks or [math.sqrt(low * high)]
    decades = [p for p in range(first, last + 1) if low <= 10.0**p <= high]
    return [10.0**power for power in decades[:: math.ceil(len(decades) / most)]]


def tick_text(value: float, plain_below: float = 1e6) -> str:
    """``64``, ``0.5``, ``2,000``; from ``plain_below`` on in powers of ten (mathtext)."""
    if value >= plain_below:
        power = math.floor(math.log10(value) + 1e-9)
        multiple = value / 10.0**power
        factor = "" if math.isclose(multiple, 1) else f"{multiple:g}\\times"
        return f"${factor}10^{{{power}}}$"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def scale_x(axes: Axes, places: Sequence[float], base: int) -> None:
    """A logarithmic horizontal axis around ``places``; of base 2 it has them all as ticks."""
    if not places:
        axes.set_xticks([])
        return
    axes.set_xscale("log", base=base)
    low, high = min(places), max(places)
    margin = max((high / low) ** 0.06, 1.15)
    axes.set_xlim(low / margin, high * margin)
    ticks = sorted(set(places)) if base == 2 else log_ticks(low / margin, high * margin, 6)
    axes.set_xticks(ticks, [tick_text(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def scale_log_y(axes: Axes, values: Sequence[tuple[float, float]]) -> None:
    """A logarithmic vertical axis around positive ``values``, each with its error."""
    axes.set_yscale("log", nonpositive="clip")
    low = min(max(value - error, 0.7 * value) for value, error in values)
    high = max(value + error for value, error in values)
    margin = max((high / low) ** 0.06, 1.05)
    axes.set_ylim(low / margin, high * margin)
    ticks = log_ticks(low / margin, high * margin, 6)
    axes.set_yticks(ticks, [tick_text(tick, plain_below=1e4) for tick in ticks])
    axes.set_yticks([], minor=True)


def keep_points_apart(axes: Axes) -> None:
    """Show at least 5 percentage points: a task on which all score alike is no place to zoom."""
    low, high = axes.get_ylim()
    if high - low < MIN_ACCURACY_SPAN:
        axes.set_ylim(low - 0.5, low - 0.5 + MIN_ACCURACY_SPAN)
