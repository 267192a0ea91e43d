"""The table and the figure of text classifiers: test accuracy by attention, over trials."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.files.artifacts import write_artifacts, write_figure
from sa_patch.files.atomic_write import write_whole
from sa_patch.training.classification.figures import draw_graphs, looks
from sa_patch.training.classification.settings import Classifier, short_name

_MARKERS = "osD^vPX"


def entry(
    source: str,
    classifier: Classifier,
    chosen: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One row: a classifier on a data set.

    Args:
        chosen: of `sa_patch.training.classification.training.choose`.
        results: of its trials, in the order of their seeds.
    """
    return {
        "source": short_name(source),
        "attention": classifier.attention,
        "classifier": dataclasses.asdict(classifier),
        "chosen": chosen,
        "parameters": results[0]["parameters"],
        "train_texts": results[0]["train_texts"],
        "test_texts": results[0]["measured_texts"],
        "seconds": statistics.fmean(result["seconds"] for result in results),
        "accuracy": spread([result["accuracy"] for result in results]),
        "ablated": {
            share: spread([result["ablated"][share] for result in results])
            for share in results[0]["ablated"]
        },
        "graph": _graph([result["measured"] for result in results if "measured" in result]),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, median and standard deviation, and what they are of."""
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _graph(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Over trials: gaps and paths by length; the drawn text of the first one."""
    if not measured:
        return None
    lengths = [
        {
            "n": rows[0]["n"],
            "texts": rows[0]["texts"],
            "gap": spread([row["gap"] for row in rows]),
            "median_path": spread([row["median_path"] for row in rows]),
        }
        for rows in zip(*(one["lengths"] for one in measured), strict=True)
    ]
    return {"lengths": lengths, "drawn": measured[0]["drawn"]}


def markdown(content: Mapping[str, Any]) -> str:
    """The table, with what was done in words."""
    lines = ["# Text classification by attention", "", " ".join(content["notes"]), ""]
    lines += [
        "| data set | layers x heads x head_dim | attention | test accuracy, % | held out, % | "
        "learning rate | epochs | s a trial |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in content["entries"]:
        one, chosen = row["classifier"], row["chosen"]
        lines.append(
            f"| {row['source']} | {one['layers']} x {one['heads']} x {one['head_dim']} | "
            f"{row['attention']} | {_percent(row['accuracy'])} | "
            f"{100 * chosen['held_out_accuracy']:.1f} | {chosen['learning_rate']:g} | "
            f"{chosen['epochs']} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _percent(spread: Mapping[str, Any]) -> str:
    shown = f"{100 * spread['mean']:.1f}"
    if spread["deviation"] is None:
        return shown
    return f"{shown} ± {100 * spread['deviation']:.1f}"


def draw(content: Mapping[str, Any]) -> Figure:
    """A panel for each data set: accuracy against head_dim, one colour for each attention."""
    entries = content["entries"]
    sources = list(dict.fromkeys(row["source"] for row in entries))
    names = list(dict.fromkeys(row["attention"] for row in entries))
    colours = looks(names)
    sizes = sorted({row["classifier"]["head_dim"] for row in entries})
    handles = [
        Line2D([], [], label=name, color=colours[name], marker=_MARKERS[i % 7], linestyle="none")
        for i, name in enumerate(names)
    ]
    layout = Layout(
        Caption("Text classification by attention", content["notes"]),
        handles,
        (1, len(sources)),
        (3.2, 2.6),
        panel_titles=True,
    )
    for panel, source in enumerate(sources):
        axes = layout.panel(panel)
        for row in (row for row in entries if row["source"] == source):
            place = names.index(row["attention"])
            axes.errorbar(
                [sizes.index(row["classifier"]["head_dim"])
                 + 0.12 * (place - (len(names) - 1) / 2)],
                [100 * row["accuracy"]["mean"]],
                yerr=[100 * (row["accuracy"]["deviation"] or 0.0)],
                color=colours[row["attention"]],
                marker=_MARKERS[place % 7],
                markersize=5,
                capsize=3,
                linestyle="none",
            )  # fmt: skip
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=FONT - 1)
        axes.set_title(source, fontsize=FONT + 1, loc="left")
        axes.set_xlabel("head_dim", fontsize=FONT)
        axes.set_ylabel("test accuracy, %", fontsize=FONT)
    return layout.figure


def write_table(
    out: Path,
    entries: Sequence[dict[str, Any]],
    notes: Sequence[str],
    provenance: Mapping[str, Any],
) -> list[Path]:
    """Write ``classification.json``, ``.png``, ``.svg`` and ``.md`` into `out`, and where graphs
    were measured ``graphs`` and ``diffusion`` as pictures.

    Args:
        entries: of `entry`; layers and heads should not differ where head_dim does not.
        notes: sentences on how it was done.
    """
    content = {"notes": list(notes), "entries": list(entries)}
    table = out / "classification.md"
    write_whole(table, markdown(content).encode())
    files = write_artifacts(out, "classification", content, draw(content), provenance)
    for name, figure in draw_graphs(content).items():
        files += write_figure(out / name, figure)
    return [*files, table]
