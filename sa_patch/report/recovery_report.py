"""Recovery as JSON, table and figure: what each pattern keeps at each cost and length."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.evaluation.recovery import DRAWS, Interval
from sa_patch.files.atomic_write import write_whole
from sa_patch.files.png import png
from sa_patch.report import captions
from sa_patch.report.recovery import Recovered, difference
from sa_patch.report.recovery_figures import SPENT, draw, draw_ranking
from sa_patch.report.recovery_items import GROUPS
from sa_patch.sweep.results import Run

NOTES = (
    "Recovery: NLL(full) / NLL(pattern) for language modelling, (score - chance) / (full - chance) "
    "for every other task; mean over the tasks of a group, then over the groups.",
    "FLOPs: attention of the prefill, choosing of blocks included, measured, as a share of full "
    "attention's on the same prompts of that length.",
    "Prompts vary in length: within a budget is what spends at most 3% more.",
    f"Intervals: 95%, paired bootstrap over items and seeds, {DRAWS} draws. A difference whose "
    "interval holds zero is none. No interval: there was one item alone, or all scored alike.",
)
VISITED_NOTE = (
    "Read by a tile: keys in blocks of 16 that hold something visible to a tile of 128 rows, as a "
    "share of what it reads under full attention; means of blocks that it reads to choose, too. "
    "Where a run has a visited.json, counted on one document under full attention."
)


@dataclass(frozen=True)
class RecoveryFiles:
    """What was written."""

    json: Path
    markdown: Path
    figure: Path
    ranking: Path


def write_recovery(
    points: Sequence[Recovered],
    runs: Sequence[Run],
    out: Path,
    command: Sequence[str] = (),
    by: str = "flops",
) -> RecoveryFiles:
    """Write ``recovery.json``, ``.md``, ``.png`` and ``ranking.png`` into a folder.

    Args:
        by: what budgets are shares of, as of `recover`.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        return _write(points, runs, out, command, by)
    except OSError as error:
        raise UserError(
            f"cannot write into {out} ({error.strerror or error}); name a folder you may write "
            "with --out"
        ) from error


def _write(
    points: Sequence[Recovered], runs: Sequence[Run], out: Path, command: Sequence[str], by: str
) -> RecoveryFiles:
    out.mkdir(parents=True, exist_ok=True)
    names = ("recovery.json", "recovery.md", "recovery.png", "ranking.png")
    files = RecoveryFiles(*(out / name for name in names))
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
    ranking = draw_ranking([_of(points, place) for place in _places(points)], by)
    for path, figure in ((files.figure, draw(points, by)), (files.ranking, ranking)):
        write_whole(path, png(figure, dpi=150))
    return files


def _at_most(budget: float | None, by: str) -> str:
    shown = "more than the budgets" if budget is None else f"at most {budget:.4g}"
    return f"{shown} of full attention's {SPENT[by].removeprefix('attention ')}"


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
    """Points of one length and budget, best first; those with most tasks before the others."""
    own = [point for point in points if (point.n, point.budget) == place]
    return sorted(own, key=lambda point: (-len(point.groups), -len(point.tasks), -point.mean.value))


def _against_best(points: Sequence[Recovered]) -> list[tuple[Recovered, Recovered]]:
    pairs = []
    for place in _places(points):
        best, *rivals = _of(points, place)
        pairs += [(best, rival) for rival in rivals if rival.tasks.keys() == best.tasks.keys()]
    return pairs


def markdown(points: Sequence[Recovered], runs: Sequence[Run], by: str = "flops") -> str:
    """One table for each length and budget, best first."""
    lines = [f"# Recovery of full attention's quality at equal {SPENT[by]}", ""]
    for n, budget in _places(points):
        own = _of(points, (n, budget))
        best = own[0]
        lines += [f"## n = {n:,}, {_at_most(budget, by)}", ""]
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
            same = point.tasks.keys() == best.tasks.keys()
            behind = _shown(difference(best, point)) if point is not best and same else "-"
            cells = [
                f"`{point.pattern}`".replace("|", r"\|"),
                point.layers.replace("|", r"\|"),
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
