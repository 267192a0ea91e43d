"""Ticks for logarithmic axes: few, round, and written as plain numbers."""

import math
from collections.abc import Sequence

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
