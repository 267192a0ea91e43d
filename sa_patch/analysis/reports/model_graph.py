"""Does a larger spectral gap go with a better score? Heads' graphs of a model under patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

from sa_patch.analysis.model_graph import HeadGraphs
from sa_patch.analysis.reports.figure_style import MARKERS, Sheet, colours_of, plain, sample
from sa_patch.analysis.reports.report import Report, as_json, short, shown


def model_graph_report(found: Sequence[HeadGraphs], about: Mapping[str, object]) -> Report:
    """What each pattern does to the graphs of a model's heads, and to its perplexity.

    Args:
        found: one for each pattern, for the same text.
        about: for the record: "model", "n" and what else was asked.
    """
    gaps = [float(one.gap.mean()) for one in found]
    # A token that only a vanishing weight ties to the rest makes a head's mean as long as it likes.
    paths = [float(np.median(one.path)) for one in found]
    losses = [one.loss for one in found]
    ranks = {"gap": _rank_correlation(gaps, losses), "path": _rank_correlation(paths, losses)}
    content = {
        "analysis": "graph of a model",
        **about,
        "patterns": [
            {
                "pattern": str(one.pattern),
                "perplexity": as_json(math.exp(one.loss)),
                "loss": as_json(one.loss),
                "gap": as_json(gap),
                "mean_path_median": as_json(path),
                "layers": as_json(one.layers),
                "gap_by_head": as_json(one.gap),
                "mean_path_by_head": as_json(one.path),
            }
            for one, gap, path in zip(found, gaps, paths, strict=True)
        ],
        "rank_correlation_with_loss": as_json(ranks),
    }
    rows = [
        (short(one.pattern), shown(math.exp(one.loss), 4), shown(gap), shown(path, 4))
        for one, gap, path in zip(found, gaps, paths, strict=True)
    ]
    columns = ("pattern", "perplexity", "spectral gap", "mean path")
    figure = _draw(found, gaps, paths, about)
    return Report("model_graph", content, figure, columns, rows, _note(ranks, len(found)))


def _rank_correlation(values: Sequence[float], losses: Sequence[float]) -> float | None:
    """Spearman's; None where it has no meaning."""
    if len(values) < 3 or len(set(values)) < 2 or len(set(losses)) < 2:
        return None
    return float(stats.spearmanr(values, losses).statistic)


def _note(ranks: Mapping[str, float | None], patterns: int) -> str:
    said = "Gap: mean over heads and layers; path: median of the heads' means."
    if ranks["gap"] is not None:
        said += (
            f" Rank correlation with the loss over {patterns} patterns: gap {ranks['gap']:.2f}, "
            f"mean path {shown(ranks['path'], 2)}; -1 for the gap would mean that more mixing "
            "always goes with a lower loss."
        )
    return said


def _draw(
    found: Sequence[HeadGraphs],
    gaps: Sequence[float],
    paths: Sequence[float],
    about: Mapping[str, object],
) -> Figure:
    colours = colours_of([one.pattern for one in found])
    looks: list[dict[str, Any]] = [
        {"color": colour, "marker": MARKERS[place % len(MARKERS)], "markersize": 6.0}
        for place, colour in enumerate(colours)
    ]
    handles = [
        sample(short(one.pattern), linewidth=1.4, **look)
        for one, look in zip(found, looks, strict=True)
    ]
    notes = [
        "A token's edges: the mean of the weights in both directions, as long as 1 / weight. Gap: "
        "1 - |lambda_2| of the walk along them; mean over heads and its standard deviation. Path: "
        "mean over pairs of tokens; median over heads and its quartiles. All layers are patched, "
        "and each pattern's weights are those of its own run.",
    ]
    sheet = Sheet(
        f"Attention graphs of {about['model']}, {about['n']} tokens",
        notes,
        handles,
        (1, 3),
        (3.6, 2.9),
    )
    gap_axes, path_axes, layer_axes = sheet.panels
    for one, gap, path, look in zip(found, gaps, paths, looks, strict=True):
        perplexity = math.exp(one.loss)
        bar: dict[str, Any] = {"linestyle": "none", "capsize": 2, "elinewidth": 0.8, **look}
        gap_axes.errorbar([gap], [perplexity], xerr=[one.gap.std()], **bar)
        low, high = np.quantile(one.path, [0.25, 0.75])
        path_axes.errorbar([path], [perplexity], xerr=[[path - low], [high - path]], **bar)
        line: dict[str, Any] = {**look, "markersize": 4.0, "linewidth": 1.2}
        layer_axes.plot(one.layers, one.gap.mean(axis=1), **line)
    for axes, name in ((gap_axes, "spectral gap"), (path_axes, "mean shortest path")):
        axes.set_yscale("log")
        _round_ticks(axes.yaxis)
        plain(axes, "", name, "perplexity")
    path_axes.set_xscale("log")
    _round_ticks(path_axes.xaxis)
    plain(layer_axes, "", "layer", "spectral gap, mean over heads")
    low = min(float(one.gap.mean(axis=1).min()) for one in found)
    layer_axes.set_ylim(bottom=min(0.0, np.floor(10 * low) / 10))
    return sheet.figure


def _round_ticks(axis: Axis) -> None:
    """1, 2 and 5 times powers of ten on a logarithmic axis, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
