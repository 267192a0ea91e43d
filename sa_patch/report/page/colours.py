"""The figures' colours on the report page, legible on its light and on its dark background."""

from __future__ import annotations

# As in page.css.
BACKGROUNDS = {False: "#ffffff", True: "#16181c"}
# WCAG 2.2, 1.4.11: graphical objects. Full attention, which all else is read against, stands out.
MIN_CONTRAST, BASELINE_CONTRAST = 3.0, 12.0
STEPS = 50


def legible(colour: str, *, dark: bool, least: float = MIN_CONTRAST) -> str:
    """``colour`` (``#rrggbb``), moved towards black or white until its contrast with the page's
    background is ``least``."""
    background = BACKGROUNDS[dark]
    target = (1.0, 1.0, 1.0) if dark else (0.0, 0.0, 0.0)
    start = _channels(colour)
    for step in range(STEPS + 1):
        share = step / STEPS
        mixed = [a + share * (b - a) for a, b in zip(start, target, strict=True)]
        found = "#" + "".join(f"{round(255 * channel):02x}" for channel in mixed)
        if contrast(found, background) >= least:
            break
    return found


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in _channels(colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _channels(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
