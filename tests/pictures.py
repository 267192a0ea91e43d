"""What a test can ask of a picture: whether anything is drawn in it."""

from pathlib import Path

import numpy as np
from PIL import Image

# One line of a figure covers more than this; titles and axes are grey and do not count.
DRAWN = 0.0005


def coloured(path: Path) -> float:
    """The share of a PNG's pixels that have a colour: data, and not text, axes or background."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    return float((pixels.max(-1) - pixels.min(-1) > 40).mean())
