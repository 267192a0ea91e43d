"""The figure of one run: loss of training and of held-out text against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.figures.colours import COLOURS
from sa_patch.figures.layout import FONT, Caption, Layout


def draw_loss(name: str, method: str, seed: int, entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the log of a run.

    Args:
        name: of the settings.
        entries: of the log: "tokens", with "loss" or "validation_loss" in nats per token.
    """
    looks = {"loss": ("training", COLOURS["sa"], ""), "validation_loss": ("held out", "black", "o")}
    caption = Caption(
        f"Pre-training '{name}': {method}, seed {seed}",
        ["Training: a step's weighted mean over text and recall answers. Held out: text."],
    )
    handles = [
        Line2D([], [], label=label, color=colour, marker=marker)
        for label, colour, marker in looks.values()
    ]
    layout = Layout(caption, handles, (1, 1), (4.8, 2.8), panel_titles=False)
    axes = layout.panel(0)
    for key, (_, colour, marker) in looks.items():
        points = [(each["tokens"] / 1000, each[key]) for each in entries if key in each]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=FONT - 1)
    axes.set_xlabel("thousand tokens", fontsize=FONT)
    axes.set_ylabel("nats per token", fontsize=FONT)
    return layout.figure
