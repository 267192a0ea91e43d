"""Scores as coloured cells with their figures in per cent."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from sa_patch.figures.layout import FONT

# Told apart by colour-blind readers, and in grey.
COLOUR_MAP = "cividis"
LIGHT_FROM = 0.45  # the colour map is light from here on, and takes black figures


def draw_scores(axes: Axes, scores: Sequence[Sequence[float]], columns: Sequence[str]) -> None:
    """Draw scores from 0 to 1, row by row; NaN where there is none."""
    axes.imshow(scores, cmap=COLOUR_MAP, vmin=0.0, vmax=1.0, aspect="auto")
    for line, row in enumerate(scores):
        for column, score in enumerate(row):
            if not math.isnan(score):
                axes.text(
                    column,
                    line,
                    f"{100 * score:.0f}",
                    ha="center",
                    va="center",
                    fontsize=FONT - 2,
                    color="white" if score < LIGHT_FROM else "black",
                )
    axes.set_xticks(range(len(columns)), columns)
    axes.tick_params(labelsize=FONT - 2, length=0)
    axes.spines[:].set_visible(False)
