"""Figures as PNG with a palette."""

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sa_patch.figures.colours import COLOURS
from sa_patch.files.png import png

# Of 255, a pixel's mean difference: what antialiased edges of five lines lose to a palette.
SEEN_BY_NOBODY = 0.25


def chart() -> Figure:
    figure = Figure(figsize=(6, 4), dpi=80)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, colour in enumerate(list(COLOURS.values())):
        axes.plot([0, 1, 2], [place, 2 * place, place**2], color=colour, label=f"line {place}")
    axes.legend()
    return figure


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=float)


def test_the_picture_is_the_figures_in_fewer_bytes() -> None:
    plain = io.BytesIO()
    chart().savefig(plain, format="png")
    packed = png(chart())
    assert len(packed) < 0.6 * len(plain.getvalue())
    assert abs(pixels(packed) - pixels(plain.getvalue())).mean() < SEEN_BY_NOBODY


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert png(chart()) == png(chart())


def test_pixels_follow_the_resolution_asked_for() -> None:
    assert pixels(png(chart())).shape == (320, 480, 3)
    assert pixels(png(chart(), dpi=160)).shape == (640, 960, 3)
