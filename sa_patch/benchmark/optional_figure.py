"""Figures are drawn where matplotlib is installed; a benchmark runs without it."""

from __future__ import annotations

from collections.abc import Callable


def drawn(draw: Callable[[], bytes]) -> bytes | None:
    """What `draw`, which imports matplotlib, gives; None where that is not installed."""
    try:
        return draw()
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
