"""Figures of classifiers: accuracy, and their attention graphs' gaps, paths and maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_patch.analysis.graphs.classifier_graph import LENGTHS, TEXTS
from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.training.spread import Look, draw_spread, label_axes, legend, looks

_JOINED: dict[str, Any] = {"markersize": 4, "linewidth": 1.2, "capsize": 2, "linestyle": "-"}
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


Row = Mapping[str, Any]
"""What `sa_patch.training.classification.comparison.entry` makes of a classifier."""


def draw_accuracy(content: Mapping[str, Any]) -> Figure:
    """A panel for each data set: accuracy against head_dim, one colour for each attention."""
    entries = content["entries"]
    sources = list(dict.fromkeys(row["source"] for row in entries))
    shown = looks(_attentions(entries))
    sizes = sorted({row["classifier"]["head_dim"] for row in entries})
    layout = Layout(
        Caption("Text classification by attention", content["notes"]),
        legend(shown, linestyle="none"),
        (1, len(sources)),
        (3.2, 2.6),
        panel_titles=True,
    )
    for panel, source in enumerate(sources):
        axes = layout.panel(panel)
        for row in (row for row in entries if row["source"] == source):
            # Side by side, so that bars do not hide each other.
            shift = list(shown).index(row["attention"]) - (len(shown) - 1) / 2
            place = sizes.index(row["classifier"]["head_dim"]) + 0.12 * shift
            draw_spread(axes, [place], [row["accuracy"]], shown[row["attention"]], 100.0)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.grid(alpha=0.25, linewidth=0.6)
        label_axes(axes, source, "head_dim", "test accuracy, %")
    return layout.figure


def draw_graphs(content: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures by name; none where no graph was measured.

    Args:
        content: as `sa_patch.training.classification.comparison.write_comparison` writes it.
    """
    entries = [row for row in content["entries"] if row["graph"] is not None]
    figures: dict[str, Figure] = {}
    if any(row["graph"]["lengths"] for row in entries):
        diverged = any(row.get("diverged") for row in content["entries"])
        figures["graphs"] = _draw_curves(entries, diverged)
    drawn = [row for row in entries if row["graph"]["drawn"] is not None]
    if drawn:
        figures["diffusion"] = _draw_maps(drawn)
    return figures


def _draw_curves(entries: Sequence[Row], diverged: bool) -> Figure:
    """A row for each data set and size: gap and path against length, accuracy against ablation.

    Args:
        diverged: whether there were trials that did, of entries without a graph too.
    """
    shown = looks(_attentions(entries))
    places = list(dict.fromkeys(map(_place, entries)))
    notes = [_GRAPH_NOTE]
    if any(one.get("without_path") for row in entries for one in row["graph"]["lengths"]):
        notes.append("Trials with a text whose weights join no two words are left out of paths.")
    if diverged:
        notes.append("Trials that diverged, to weights that are no finite numbers, have no graph.")
    layout = Layout(
        Caption("Attention graphs of text classifiers", notes),
        legend(shown),
        (len(places), 3),
        (2.7, 2.0),
        panel_titles=True,
    )
    ticks = sorted({one["n"] for row in entries for one in row["graph"]["lengths"]})
    for index, place in enumerate(places):
        gaps, paths, ablation = (layout.panel(3 * index + column) for column in range(3))
        for row in (row for row in entries if _place(row) == place):
            look, lengths = shown[row["attention"]], row["graph"]["lengths"]
            known = [one for one in lengths if one["gap"]]
            ns, spreads = [one["n"] for one in known], [one["gap"] for one in known]
            draw_spread(gaps, ns, spreads, look, **_JOINED)
            _draw_paths(paths, [one for one in lengths if one["median_path"]], look)
            shares = [0.0, *(100 * float(share) for share in row["ablated"])]
            scores = [row["accuracy"], *row["ablated"].values()]
            draw_spread(ablation, shares, scores, look, 100.0, **_JOINED)
        title = ", ".join(place)
        label_axes(gaps, title, "words n", "spectral gap", FONT)
        label_axes(paths, title, "words n", "mean path", FONT)
        label_axes(ablation, title, "words taken away, %", "test accuracy, %", FONT)
        for axes in (gaps, paths, ablation):
            axes.grid(color="#E6E6E6", linewidth=0.7)
        for axes in (gaps, paths):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
        lengths = [
            one for row in entries if _place(row) == place for one in row["graph"]["lengths"]
        ]
        if not lengths:
            for axes in (gaps, paths):
                _say(axes, f"fewer than {TEXTS} test texts\nof {LENGTHS[0]} words")
            continue
        medians = [one["median_path"]["median"] for one in lengths if one["median_path"]]
        if not medians:
            _say(paths, "weights join no two words")
            continue
        paths.set_yscale("log", base=2)
        # One trial's graph may fall apart into parts that are as far apart as numbers go.
        paths.set_ylim(min(medians) / 1.5, max(medians) * 1.5)
        paths.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return layout.figure


def _say(axes: Axes, text: str) -> None:
    """Why a panel is empty, in place of its ticks."""
    axes.set(xticks=[], yticks=[])
    axes.minorticks_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=FONT, transform=axes.transAxes)


def _draw_paths(axes: Axes, lengths: Sequence[Row], look: Look) -> None:
    """Medians, with whiskers from the least to the greatest value."""
    places, spreads = [one["n"] for one in lengths], [one["median_path"] for one in lengths]
    medians = [one["median"] for one in spreads]
    below = [one["median"] - min(one["values"]) for one in spreads]
    above = [max(one["values"]) - one["median"] for one in spreads]
    axes.errorbar(places, medians, yerr=[below, above], color=look[0], marker=look[1], **_JOINED)


def _draw_maps(entries: Sequence[Row]) -> Figure:
    """A row for each data set and size, a panel for each attention."""
    shown = looks(_attentions(entries))
    places = list(dict.fromkeys(map(_place, entries)))
    layout = Layout(
        Caption("Diffusion maps of a text's attention", [_MAP_NOTE]),
        [],
        (len(places), len(shown)),
        (3.0, 2.6),
        panel_titles=True,
        gap=0.7,
    )
    for row in entries:
        column = list(shown).index(row["attention"])
        axes = layout.panel(places.index(_place(row)) * len(shown) + column)
        drawn = row["graph"]["drawn"]
        x, y = zip(*drawn["places"], strict=True)
        axes.plot(x, y, ".", color=shown[row["attention"]][0], markersize=4)
        for index in range(0, len(x), 4):
            # A dollar sign would begin a formula.
            word = drawn["words"][index].replace("$", r"\$")
            axes.annotate(word, (x[index], y[index]), fontsize=FONT - 2.5, alpha=0.85)
        axes.set_title(
            f"{', '.join(_place(row))}, {row['attention']}: gap {drawn['gap']:.2f}",
            fontsize=FONT - 0.5,
            loc="left",
        )
        axes.tick_params(labelsize=FONT - 2.5)
    return layout.figure


def _attentions(entries: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["attention"] for row in entries))


def _place(row: Row) -> tuple[str, str]:
    """The data set and the classifier's size, in words."""
    one = row["classifier"]
    if one["layers"] == one["heads"] == 1:
        return row["source"], f"head_dim {one['head_dim']}"
    return row["source"], f"{one['layers']} x {one['heads']} x {one['head_dim']}"
