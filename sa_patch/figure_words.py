"""Where a figure's title and notes stand, the same in every figure of the package."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

FONT = 9.0
NOTE_COLOUR = "#404040"
MARGIN = 0.15  # inches to the left of words


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
