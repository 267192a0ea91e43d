"""Attention maps side by side: the paper's Figure 3 (arXiv 2604.00754)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sa_patch.analysis.attention_maps import AttentionMap, HeadInputs, attention_maps
from sa_patch.analysis.reports.figure_style import FONT, Sheet
from sa_patch.analysis.reports.report import Report, as_json, short, shown
from sa_patch.patterns import Pattern

_MASKED = "#BDBDBD"
_SMALLEST = 1e-4


def attention_report(
    inputs: HeadInputs,
    patterns: Sequence[Pattern],
    layer: int,
    head: int,
    about: Mapping[str, str],
) -> Report:
    """One head's weights under each pattern.

    Args:
        about: for the record: the "model" and what else was asked.
    """
    maps = attention_maps(inputs, patterns, layer, head)
    n = inputs.q.shape[1]
    content = {
        "analysis": "attention",
        **about,
        "n": n,
        "layer": layer,
        "head": head,
        "patterns": [
            {
                "pattern": str(one.pattern),
                "mean_keys": as_json(one.mean_keys),
                "weight_kept": as_json(one.kept),
            }
            for one in maps
        ],
    }
    rows = [(short(one.pattern), shown(one.mean_keys, 4), f"{one.kept:.1%}") for one in maps]
    columns = ("pattern", "keys per query", "full attention's weight that is kept")
    return Report("attention", content, _draw(maps, n, layer, head, about["model"]), columns, rows)


def _draw(maps: Sequence[AttentionMap], n: int, layer: int, head: int, model: str) -> Figure:
    columns = min(len(maps), 4)
    notes = [
        "Rows are queries, columns keys. Grey: masked, by the pattern or because it lies ahead. "
        "All panels are from the same queries and keys, those of the stock model. Kept: the share "
        "of full attention's weight that falls on visible keys, mean over queries.",
    ]
    sheet = Sheet(
        f"Attention of {model}, layer {layer}, head {head}, {n} tokens",
        notes,
        [],
        (math.ceil(len(maps) / columns), columns),
        (3.1, 3.3),
    )
    colours = colormaps["magma"].with_extremes(bad=_MASKED)
    for axes, one in zip(sheet.panels, maps, strict=False):
        weights = np.ma.array(one.weights.numpy(), mask=~one.visible.numpy())
        image = axes.imshow(
            np.ma.clip(weights, _SMALLEST, 1),
            cmap=colours,
            norm=LogNorm(_SMALLEST, 1),
            interpolation="nearest",
        )
        axes.set_title(
            f"{short(one.pattern)}\n{one.mean_keys:.1f} keys a query, {one.kept:.0%} kept",
            fontsize=FONT,
        )
        axes.set_xlabel("key", fontsize=FONT)
        axes.tick_params(labelsize=FONT - 1.5)
    for axes in sheet.panels[::columns]:
        axes.set_ylabel("query", fontsize=FONT)
    for axes in sheet.panels[len(maps) :]:
        axes.set_visible(False)
    bar = sheet.figure.colorbar(image, ax=sheet.panels, shrink=0.75, pad=0.015, extend="min")
    bar.set_label("attention weight", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    return sheet.figure
