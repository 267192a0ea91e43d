"""Figures of classifiers' attention graphs: gaps, paths, ablation, and diffusion maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.figures.colours import FULL_COLOUR, OTHER_COLOURS
from sa_patch.figures.layout import FONT, Caption, Layout

MARKERS = "osD^vPX"
_GRAPH_NOTE = (
    "Of the graph of attention weights within texts cut to n words, an edge as long as 1 / weight "
    "(mean of both directions). Gap: mean over texts, ± standard deviation over trials. Path: mean "
    "over pairs of words, median over texts, heads and layers, then over trials; whiskers from the "
    "least to the greatest trial, cut off where they leave the panel. "
    "Ablation: a random share of each text's words is no key, no query and not averaged."
)
_MAP_NOTE = (
    "Where walks along attention weights lead (Coifman & Lafon 2006), first layer and head, first "
    "trial; words that are near give and take attention alike. Every fourth word is named."
)


def looks(names: Sequence[str]) -> dict[str, str]:
    """A colour for each attention; dot product is black."""
    others = iter(OTHER_COLOURS * len(names))
    return {name: FULL_COLOUR if name == "dot" else next(others) for name in names}


def draw_graphs(content: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures by name; none where no graph was measured.

    Args:
        content: as `sa_patch.training.classification.table.write_table` writes it.
    """
    entries = [row for row in content["entries"] if row["graph"] is not None]
    figures: dict[str, Figure] = {}
    if any(row["graph"]["lengths"] for row in entries):
        figures["graphs"] = _draw_curves(entries)
    drawn = [row for row in entries if row["graph"]["drawn"] is not None]
    if drawn:
        figures["diffusion"] = _draw_maps(drawn)
    return figures


def _draw_curves(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """A row for each data set and size: gap and path against length, accuracy against ablation."""
    names = list(dict.fromkeys(row["attention"] for row in entries))
    colours = looks(names)
    places = list(dict.fromkeys((row["source"], _size(row)) for row in entries))
    handles = [
        Line2D([], [], label=name, color=colours[name], marker=MARKERS[i % 7])
        for i, name in enumerate(names)
    ]
    layout = Layout(
        Caption("Attention graphs of text classifiers", [_GRAPH_NOTE]),
        handles,
        (len(places), 3),
        (2.7, 2.0),
        panel_titles=True,
    )
    for index, (source, size) in enumerate(places):
        panels = [layout.panel(3 * index + column) for column in range(3)]
        for row in entries:
            if (row["source"], _size(row)) != (source, size):
                continue
            look = {
                "color": colours[row["attention"]],
                "marker": MARKERS[names.index(row["attention"]) % 7],
            }
            lengths = row["graph"]["lengths"]
            ns = [one["n"] for one in lengths]
            _line(panels[0], ns, [one["gap"] for one in lengths], 1.0, look)
            _paths(panels[1], ns, [one["median_path"] for one in lengths], look)
            shares = [0.0, *map(float, row["ablated"])]
            scores = [row["accuracy"], *row["ablated"].values()]
            _line(panels[2], [100 * share for share in shares], scores, 100.0, look)
        words = (("words n", "spectral gap"), ("words n", "mean path"),
                 ("words taken away, %", "test accuracy, %"))  # fmt: skip
        for axes, (x, y) in zip(panels, words, strict=True):
            axes.set_title(f"{source}, {size}", fontsize=FONT, loc="left")
            axes.set_xlabel(x, fontsize=FONT)
            axes.set_ylabel(y, fontsize=FONT)
            axes.tick_params(labelsize=FONT - 1)
            axes.grid(color="#E6E6E6", linewidth=0.7)
        for axes in panels[:2]:
            axes.set_xscale("log", base=2)
            ticks = sorted({one["n"] for row in entries for one in row["graph"]["lengths"]})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
        panels[1].set_yscale("log", base=2)
        shown = [
            one["median_path"]["median"]
            for row in entries
            if (row["source"], _size(row)) == (source, size)
            for one in row["graph"]["lengths"]
        ]
        # One trial's graph may fall in pieces, which are as far apart as numbers go.
        panels[1].set_ylim(min(shown) / 1.5, max(shown) * 1.5)
        panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return layout.figure


def _line(
    axes: Axes,
    places: Sequence[float],
    spreads: Sequence[Mapping[str, Any]],
    scale: float,
    look: Mapping[str, Any],
) -> None:
    axes.errorbar(
        places,
        [scale * one["mean"] for one in spreads],
        yerr=[scale * (one["deviation"] or 0.0) for one in spreads],
        markersize=4,
        linewidth=1.2,
        capsize=2,
        **look,
    )


def _paths(
    axes: Axes,
    places: Sequence[float],
    spreads: Sequence[Mapping[str, Any]],
    look: Mapping[str, Any],
) -> None:
    middles = [one["median"] for one in spreads]
    below = [one["median"] - min(one["values"]) for one in spreads]
    above = [max(one["values"]) - one["median"] for one in spreads]
    axes.errorbar(
        places, middles, yerr=[below, above], markersize=4, linewidth=1.2, capsize=2, **look
    )


def _draw_maps(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """A row for each data set and size, a panel for each attention."""
    names = list(dict.fromkeys(row["attention"] for row in entries))
    places = list(dict.fromkeys((row["source"], _size(row)) for row in entries))
    layout = Layout(
        Caption("Diffusion maps of a text's attention", [_MAP_NOTE]),
        [],
        (len(places), len(names)),
        (3.0, 2.6),
        panel_titles=True,
        gap=0.7,
    )
    colours = looks(names)
    for row in entries:
        at = places.index((row["source"], _size(row)))
        axes = layout.panel(at * len(names) + names.index(row["attention"]))
        drawn = row["graph"]["drawn"]
        x, y = zip(*drawn["places"], strict=True)
        axes.plot(x, y, ".", color=colours[row["attention"]], markersize=4)
        for index in range(0, len(x), 4):
            # A dollar sign would begin a formula.
            word = drawn["words"][index].replace("$", r"\$")
            axes.annotate(word, (x[index], y[index]), fontsize=FONT - 2.5, alpha=0.85)
        axes.set_title(
            f"{row['source']}, {_size(row)}, {row['attention']}: gap {drawn['gap']:.2f}",
            fontsize=FONT - 0.5,
            loc="left",
        )
        axes.tick_params(labelsize=FONT - 2.5)
    return layout.figure


def _size(row: Mapping[str, Any]) -> str:
    one = row["classifier"]
    if one["layers"] == one["heads"] == 1:
        return f"head_dim {one['head_dim']}"
    return f"{one['layers']} x {one['heads']} x {one['head_dim']}"
