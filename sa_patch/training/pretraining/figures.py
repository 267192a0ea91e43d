"""Figures of pre-training: the loss of one run, and methods compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sa_patch.figures.colours import COLOURS
from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.training.spread import Look, draw_spread, label_axes, legend, looks

Looks = Mapping[str, Look]


def draw_loss(name: str, method: str, seed: int, entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss of training and of held-out text against tokens, from the log of a run.

    Args:
        name: of the settings.
        entries: of the log: "tokens", with "loss" or "validation_loss" in nats per token, None
            where it was no finite number.
    """
    shown: Looks = {"training": (COLOURS["sa"], ""), "held out": ("black", "o")}
    notes = ["Training: a step's weighted mean over text and recall answers. Held out: text."]
    if any(
        each[key] is None for key in ("loss", "validation_loss") for each in entries if key in each
    ):
        notes.append("Diverged: the loss is no finite number where a line has gaps or ends.")
    caption = Caption(f"Pre-training '{name}': {method}, seed {seed}", notes)
    layout = Layout(caption, legend(shown), (1, 1), (4.8, 2.8), panel_titles=False)
    axes = layout.panel(0)
    for key, (colour, marker) in zip(("loss", "validation_loss"), shown.values(), strict=True):
        points = [(each["tokens"] / 1000, _drawn(each[key])) for each in entries if key in each]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2)
    axes.grid(alpha=0.25, linewidth=0.6)
    label_axes(axes, "", "thousand tokens", "nats per token")
    return layout.figure


def draw_comparison(summary: Mapping[str, Any]) -> Figure:
    """Loss curves, perplexity, recall by distance, and gates by layer.

    Args:
        summary: of `sa_patch.training.pretraining.comparison.summarize`.
    """
    methods: Mapping[str, Any] = summary["methods"]
    shown = looks(list(methods))
    gated = [name for name, entry in methods.items() if entry["gates"]]
    recall = any(entry["recall_by_distance"] for entry in methods.values())
    panels = [_loss_curves, _perplexity]
    panels += [_recall] if recall else []
    panels += [_gates] if gated else []
    settings = summary["settings"]
    seeds = max(len(entry["seeds"]) for entry in methods.values())
    notes = [
        f"{summary['tokens']:,} tokens in {settings['steps']:,} steps; sequences of "
        f"{settings['sequence']} tokens, window {settings['window']}.",
        f"Points: mean over {seeds} seeds, bars: standard deviation; loss curves: one line a seed.",
    ]
    if gated:
        notes.append("Gates: mean over held-out tokens and heads; a new model's stand near 0.5.")
    if said := diverged(methods):
        notes.append(said)
    caption = Caption(f"Pre-training '{settings['name']}' at equal steps and data", notes)
    handles = legend(shown, linewidth=1.6)
    layout = Layout(caption, handles, ((len(panels) + 1) // 2, 2), (3.4, 2.4), panel_titles=True)
    for index, panel in enumerate(panels):
        axes = layout.panel(index)
        axes.grid(alpha=0.25, linewidth=0.6)
        panel(axes, methods, shown)
    return layout.figure


def diverged(methods: Mapping[str, Any]) -> str:
    """Which runs of a summary's methods have no finite perplexity, in a sentence; else empty."""
    runs = [
        f"{name} seed {seed}"
        for name, entry in methods.items()
        for seed in entry.get("diverged", ())
    ]
    if not runs:
        return ""
    return f"Diverged, to no finite perplexity, and left out of all means: {', '.join(runs)}."


def _drawn(value: float | None) -> float:
    return math.nan if value is None else value


def _loss_curves(axes: Axes, methods: Mapping[str, Any], looks: Looks) -> None:
    for name, entry in methods.items():
        for curve in entry["curves"]:
            points = curve["validation_loss"]
            axes.plot(
                [tokens / 1000 for tokens, _ in points],
                [_drawn(loss) for _, loss in points],
                color=looks[name][0],
                linewidth=1.2,
                alpha=0.8,
            )
    label_axes(axes, "held-out loss", "thousand tokens", "nats per token")


def _perplexity(axes: Axes, methods: Mapping[str, Any], looks: Looks) -> None:
    for place, (name, entry) in enumerate(methods.items()):
        if entry["validation_perplexity"]:
            draw_spread(axes, [place], [entry["validation_perplexity"]], looks[name])
    axes.set_xticks(range(len(methods)), [name.partition(":")[0] for name in methods])
    axes.set_xlim(-0.5, len(methods) - 0.5)
    label_axes(axes, "held-out perplexity", "", "perplexity")


def _recall(axes: Axes, methods: Mapping[str, Any], looks: Looks) -> None:
    labels: list[str] = []
    for shift, (name, entry) in enumerate(methods.items()):
        buckets = entry["recall_by_distance"]
        labels = labels or [_distances(each) for each in buckets]
        # Side by side, so that bars do not hide each other.
        offset = 0.1 * (shift - (len(methods) - 1) / 2)
        places = [i + offset for i, each in enumerate(buckets) if each["accuracy"]]
        measured = [each["accuracy"] for each in buckets if each["accuracy"]]
        _draw_joined(axes, places, measured, looks[name], scale=100.0)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(-3, 103)
    label_axes(axes, "key-value recall", "tokens from question back to answer", "right answers, %")


def _distances(bucket: Mapping[str, Any]) -> str:
    if bucket["below"] is None:
        return f"{bucket['from']}+"
    return f"{bucket['from']}-{bucket['below'] - 1}"


def _gates(axes: Axes, methods: Mapping[str, Any], looks: Looks) -> None:
    for entry in methods.values():
        for branch, offset in (("sa", -0.06), ("swa", 0.06)):
            means = [layer[branch] for layer in entry["gates"]]
            if means:
                places = [layer + offset for layer in range(len(means))]
                label = f"gate of {branch.upper()}"
                _draw_joined(axes, places, means, (COLOURS[branch], "o"), label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=FONT - 1, frameon=False)
    label_axes(axes, "gates of gated SA + SWA", "layer", "mean gate")


def _draw_joined(
    axes: Axes,
    places: Sequence[float],
    spreads: Sequence[Mapping[str, Any]],
    look: Look,
    scale: float = 1.0,
    label: str | None = None,
) -> None:
    draw_spread(axes, places, spreads, look, scale)
    means = [scale * one["mean"] for one in spreads]
    axes.plot(places, means, color=look[0], linewidth=1.2, label=label)
