"""Recovery as JSON, table and figure: what each pattern keeps at each cost and length."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sa_patch.evaluation.recovery import DRAWS, Interval
from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.files.atomic_write import write_whole
from sa_patch.patterns import RIVALS, ByHead, parse_pattern, parts_of
from sa_patch.report import captions
from sa_patch.report.recovery import Recovered, difference
from sa_patch.report.recovery_items import GROUPS
from sa_patch.report.variants import METHOD_LABELS
from sa_patch.sweep.results import Run

NOTES = (
    "Recovery: NLL(full) / NLL(pattern) for language modelling, (score - chance) / (full - chance) "
    "for every other task; mean over the tasks of a group, then over the groups.",
    "FLOPs: attention of the prefill, choosing of blocks included, measured, as a share of full "
    "attention's on the same prompts of that length.",
    f"Intervals: 95%, paired bootstrap over items and seeds, {DRAWS} draws. A difference whose "
    "interval holds zero is none. No interval: there was one item alone, or all scored alike.",
)
VISITED_NOTE = (
    "Read by a tile: keys in blocks of 16 that hold something visible to a tile of 128 rows, as a "
    "share of what it reads under full attention; means of blocks that it reads to choose, too. "
    "Where a run has a visited.json, counted on one document under full attention."
)
# What budgets are shares of.
_SPENT = {"flops": "attention FLOPs", "visited": "keys that a tile reads"}
# In the order in which a composition's parts are named.
_KINDS = (
    *("sinks", "swa", "sa", "psa", "moba", "block_topk", "tail"),
    *(cls.name for cls in RIVALS),
    ByHead.name,
)
_PANEL = (4.6, 3.4)  # inches
_CHARACTER = 0.072  # inches, of the legend


@dataclass(frozen=True)
class RecoveryFiles:
    """What was written."""

    json: Path
    markdown: Path
    figure: Path


def write_recovery(
    points: Sequence[Recovered],
    runs: Sequence[Run],
    out: Path,
    command: Sequence[str] = (),
    by: str = "flops",
) -> RecoveryFiles:
    """Write ``recovery.json``, ``recovery.md`` and ``recovery.png`` into a folder.

    Args:
        by: what budgets are shares of, as of `recover`.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = RecoveryFiles(out / "recovery.json", out / "recovery.md", out / "recovery.png")
    content = {
        "command": list(command),
        "notes": list(NOTES),
        "budgets_by": by,
        "runs": [str(run.path.name) for run in runs],
        "points": [_plain(point) for point in points],
        "against_the_best": [
            {
                "n": best.n,
                "budget": best.budget,
                "best": best.pattern,
                "layers": best.layers,
                "rival": rival.pattern,
                "rival_layers": rival.layers,
                "difference": dataclasses.asdict(difference(best, rival)),
            }
            for best, rival in _against_best(points)
        ],
    }
    write_whole(files.json, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    write_whole(files.markdown, markdown(points, runs, by).encode())
    picture = io.BytesIO()
    draw(points, by).savefig(picture, format="png", dpi=150)
    write_whole(files.figure, picture.getvalue())
    return files


def _plain(point: Recovered) -> dict[str, Any]:
    left_out = {"draws", "groups", "mean", *(["visited"] if point.visited is None else [])}
    plain = {
        field.name: getattr(point, field.name)
        for field in dataclasses.fields(point)
        if field.name not in left_out
    }
    plain["groups"] = {name: dataclasses.asdict(found) for name, found in point.groups.items()}
    plain["mean"] = dataclasses.asdict(point.mean)
    return plain


def _places(points: Sequence[Recovered]) -> list[tuple[int, float | None]]:
    places = {(point.n, point.budget) for point in points}
    return sorted(places, key=lambda place: (place[0], place[1] or 1.0))


def _of(points: Sequence[Recovered], place: tuple[int, float | None]) -> list[Recovered]:
    """Points of one length and budget, best first; those with most groups before the others."""
    own = [point for point in points if (point.n, point.budget) == place]
    return sorted(own, key=lambda point: (-len(point.groups), -point.mean.value))


def _against_best(points: Sequence[Recovered]) -> list[tuple[Recovered, Recovered]]:
    pairs = []
    for place in _places(points):
        best, *rivals = _of(points, place)
        pairs += [(best, rival) for rival in rivals if rival.groups.keys() == best.groups.keys()]
    return pairs


def markdown(points: Sequence[Recovered], runs: Sequence[Run], by: str = "flops") -> str:
    """One table for each length and budget, best first."""
    lines = [f"# Recovery of full attention's quality at equal {_SPENT[by]}", ""]
    for n, budget in _places(points):
        own = _of(points, (n, budget))
        best = own[0]
        shown = "more than the budgets" if budget is None else f"at most {budget:.4g}"
        of_full = f"full attention's {_SPENT[by].removeprefix('attention ')}"
        lines += [f"## n = {n:,}, {shown} of {of_full}", ""]
        counted = any(point.visited is not None for point in own)
        headings = [
            *("pattern", "layers", "seeds", "FLOPs", *(["read by a tile"] if counted else [])),
            *("keys per query", *GROUPS, "mean", "behind the best"),
        ]
        lines += [
            "| " + " | ".join(headings) + " |",
            "| --- | --- |" + " ---: |" * (len(headings) - 2),
        ]
        for point in own:
            same = point.groups.keys() == best.groups.keys()
            behind = _shown(difference(best, point)) if point is not best and same else "-"
            cells = [
                f"`{point.pattern}`",
                point.layers,
                str(point.seeds),
                f"{point.share:.4f}",
                *(["-" if point.visited is None else f"{point.visited:.4f}"] if counted else []),
                f"{point.mean_keys:.1f}",
                *(_shown(point.groups[g]) if g in point.groups else "-" for g in GROUPS),
                f"**{_shown(point.mean)}**",
                behind,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"- {note}" for note in NOTES]
    if any(point.visited is not None for point in points):
        lines.append(f"- {VISITED_NOTE}")
    lines += ["", "## Provenance", ""]
    for run in runs:
        lines += [f"- {line}" for line in captions.run_lines(run)]
    return "\n".join(lines) + "\n"


def _shown(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def draw(points: Sequence[Recovered], by: str = "flops") -> Figure:
    """Mean recovery against cost: a panel for each length, a colour for each composition.

    Patterns of one composition differ in their numbers, also within a budget; its line joins the
    best of each budget.
    """
    lengths = sorted({point.n for point in points})
    names = list(dict.fromkeys(composition(p) for p in _by_quality(points)))
    columns = min(2, len(lengths))
    rows = -(-len(lengths) // columns)
    # The legend takes two columns where the figure is wide enough for its labels.
    entry = _CHARACTER * max(map(len, names), default=0) + 0.6
    legend_columns = 2 if 2 * entry <= columns * _PANEL[0] else 1
    legend = 0.19 * -(-len(names) // legend_columns) + 0.5
    width, height = max(columns * _PANEL[0], entry), rows * _PANEL[1] + legend
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(lengths):
            axes.set_visible(False)
            continue
        _panel(axes, [point for point in points if point.n == lengths[place]], names, by)
        axes.set_title(f"n = {lengths[place]:,}", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=legend_columns,
        fontsize=8,
        frameon=False,
    )
    return figure


def composition(point: Recovered) -> str:
    """The kinds of a point's parts, whatever their numbers."""
    pattern = parse_pattern(point.pattern)
    parts = {part.name for part in parts_of(pattern)}
    kinds = " + ".join(METHOD_LABELS[kind] for kind in _KINDS if kind in parts)
    return kinds if point.layers == "all" else f"{kinds}; other in some layers"


def _by_quality(points: Sequence[Recovered]) -> list[Recovered]:
    return sorted(points, key=lambda point: -point.mean.value)


def _panel(axes: Axes, points: Sequence[Recovered], names: Sequence[str], by: str) -> None:
    def spent(point: Recovered) -> float:
        return point.share if by == "flops" or point.visited is None else point.visited

    colours = (*COLOURS.values(), *OTHER_COLOURS, FULL_COLOUR)
    markers = "os^DvPX*"
    for index, name in enumerate(names):
        own = [point for point in points if composition(point) == name]
        style: dict[str, Any] = {
            "color": colours[index % len(colours)],
            "marker": markers[index // len(colours) % len(markers)],
            "linewidth": 1.2,
        }
        line_style = "-" if index < len(colours) else "--"
        axes.errorbar(
            [spent(point) for point in own],
            [point.mean.value for point in own],
            yerr=[
                [max(0.0, point.mean.value - point.mean.low) for point in own],
                [max(0.0, point.mean.high - point.mean.value) for point in own],
            ],
            label=name,
            markersize=5,
            capsize=2,
            elinewidth=0.7,
            linestyle="",
            **style,
        )
        best: dict[float | None, Recovered] = {}
        for point in sorted(own, key=lambda point: point.mean.value):
            best[point.budget] = point
        line = sorted(best.values(), key=spent)
        axes.plot(
            [spent(point) for point in line],
            [point.mean.value for point in line],
            linestyle=line_style,
            markersize=0,
            **style,
        )
    axes.axhline(1.0, color="black", linewidth=1, linestyle=(0, (5, 3)))
    axes.axhline(0.95, color="#8C8C8C", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda share, _: f"1/{1 / share:g}" if share < 1 else f"{share:g}"
    )
    axes.tick_params(labelbottom=True, labelleft=True)
    axes.set_xlabel(f"{_SPENT[by]}, share of full attention's", fontsize=9)
    axes.set_ylabel("mean recovery", fontsize=9)
    axes.tick_params(labelsize=8)
