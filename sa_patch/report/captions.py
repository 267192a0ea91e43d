"""What a report says in words: titles, notes under figures, provenance and what is missing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sa_patch.report.aggregate import Comparison
from sa_patch.sweep.results import Cell, Run, SetAside


def models(cells: Sequence[Cell]) -> str:
    """Their names; of a folder beside the run, without the dot before it."""
    names = {str(cell.setting["model_name"]).removeprefix("./") for cell in cells}
    return " and ".join(sorted(names))


def average_title(comparison: Comparison, cells: Sequence[Cell]) -> str:
    tasks = comparison.average_tasks
    what = f"average accuracy over {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    return f"{models(cells)}: {what}"


def tasks_title(comparison: Comparison, cells: Sequence[Cell]) -> str:
    if len(comparison.tasks) == 1:
        return f"{models(cells)}: {comparison.tasks[0]}"
    return f"{models(cells)}: results by task"


def pareto_title(cells: Sequence[Cell]) -> str:
    return f"{models(cells)}: score against cost, all methods"


def depth_title(cells: Sequence[Cell]) -> str:
    return f"{models(cells)}: accuracy by depth of the needle"


def average_note(comparison: Comparison) -> str:
    """How the average is made, or why there is none."""
    if not comparison.average_tasks:
        reasons = "; ".join(f"{task}: {why}" for task, why in comparison.left_out.items())
        return f"No average: no task has an accuracy for every point ({reasons})."
    if len(comparison.average_tasks) == 1:
        note = f"Accuracy: of {comparison.average_tasks[0]} alone."
    else:
        note = (
            f"Average: unweighted mean of the primary accuracies of "
            f"{', '.join(comparison.average_tasks)} (the accuracy tasks that every point has)."
        )
    if comparison.left_out:
        reasons = "; ".join(f"{task} ({why})" for task, why in comparison.left_out.items())
        note += f" Left out of it: {reasons}."
    return note


def error_note(comparison: Comparison) -> str:
    counts: dict[str, set[int]] = {}
    for point in comparison.points:
        if point.seeds != (None,):
            counts.setdefault(point.series.label, set()).add(len(point.seeds))
    note = "Error bars: ±1 standard error, from the sampling of items"
    if not counts:
        return note + "."
    seeds = "; ".join(
        f"{label}: {_span(numbers)} seed{'' if numbers == {1} else 's'}"
        for label, numbers in counts.items()
    )
    note += f" and from seeds ({seeds})."
    if any(1 in numbers for numbers in counts.values()):
        note += " A point with one seed has no seed part in its bar."
    return note


def axis_note(comparison: Comparison, x: str, apart: bool = True) -> str:
    """What the horizontal axis counts. ``apart``: whether points at one window are drawn so."""
    if x == "window":
        note = "Window: the keys a query may see."
        if any(series.method == "sa" for series in comparison.series):
            note += " For SA that is the mean over a long sequence; its last query sees up to twice"
            note += " as many."
        return note + (" Methods at one window are set slightly apart sideways." if apart else "")
    if x == "mean_keys":
        return (
            "Keys per query: earlier tokens (its own included) that a prompt token saw, measured, "
            "mean over all prompt tokens; below the window where prompts are short or early tokens "
            "have few before them."
        )
    if x == "visited":
        return (
            "Keys that a tile reads: a kernel on matrix units reads keys for a tile of 128 rows "
            "(queries times the heads that share a KV head), here in blocks of 16 that hold "
            "something visible to one of them; counted on a few layers and prompts, what is read "
            "to choose blocks included."
        )
    if x == "seconds":
        return (
            "Seconds: time in the model per sequence, the decoding of generated tokens included; "
            "comparable within one machine and batch size, if nothing else ran there. Sequences "
            "that were not run, because full attention had answered them, are left out: they are "
            "the short ones, so that only a sweep with --no-reuse compares all points."
        )
    return (
        "FLOPs: attention in the prefill of all layers, measured against full attention on the "
        "same prompts; the choosing of blocks, where a method chooses, is included."
    )


def saturation_note(comparison: Comparison) -> str | None:
    if not any(point.saturated for point in comparison.points):
        return None
    return (
        "Hollow points are saturated: for at least half of the sequences the pattern left no "
        "earlier token out, so it was full attention there and says little about sparsity."
    )


def subset_note(cells: Sequence[Cell]) -> str | None:
    """Which limits held; ``None`` if every task ran whole."""
    limits: dict[Any, set[str]] = {}
    for cell in cells:
        limit = cell.setting.get("limit")
        if limit is not None:
            limits.setdefault(limit, set()).add(cell.task)
    if not limits:
        return None
    every = {cell.task for cell in cells}
    if len(limits) == 1 and next(iter(limits.values())) == every:
        which = f"the first {next(iter(limits))} items of each task"
    else:
        which = "; ".join(
            f"the first {limit} items of {', '.join(sorted(tasks))}"
            for limit, tasks in sorted(limits.items(), key=lambda pair: str(pair[0]))
        )
    return f"Figures on a subset: {which} (of each subtask in a group such as mmlu)."


def missing_note(runs: Iterable[Run]) -> str | None:
    """How much of the plan has no result; ``None`` if nothing is missing."""
    runs = list(runs)
    planned = sum(len(run.planned or ()) for run in runs)
    missing = sum(len(run.missing) for run in runs)
    if not missing:
        return None
    failed = sum(aside.reason.startswith("failed") for run in runs for aside in run.set_aside)
    cells = "cell is" if missing == 1 else "cells are"
    note = f"Incomplete: {missing} of {planned} planned {cells} missing"
    return note + (f" ({failed} of them failed)." if failed else ".")


def set_aside_lines(set_aside: Sequence[SetAside]) -> list[str]:
    return [f"{aside.path.name}: {aside.reason}" for aside in set_aside]


def figure_notes(
    comparison: Comparison, cells: Sequence[Cell], runs: Sequence[Run], x: str, average: bool
) -> list[str]:
    notes = [
        average_note(comparison) if average else None,
        axis_note(comparison, x),
        error_note(comparison)
        + (
            " Grey band: the same for full attention."
            if any(s.is_full for s in comparison.series)
            else ""
        ),
        saturation_note(comparison),
        subset_note(cells),
        missing_note(runs),
    ]
    return [note for note in notes if note]


def pareto_notes(
    comparison: Comparison, cells: Sequence[Cell], runs: Sequence[Run], x: str
) -> list[str]:
    frontier = (
        "Frontier: the best score of any sparse method that costs at most so much, point by point; "
        "it has no interval of its own, so look at the error bars. Full attention: dashed line and "
        "star."
    )
    several = len(comparison.average_tasks) > 1
    return [frontier, *figure_notes(comparison, cells, runs, x, average=several)]


def depth_notes(cells: Sequence[Cell], runs: Sequence[Run]) -> list[str]:
    notes = [
        "Accuracy in %, mean over seeds, on the items whose needle lies near this depth: 0 is the "
        "beginning of the text, 100 its end. A row is a method at a window (@).",
        subset_note(cells),
        missing_note(runs),
    ]
    return [note for note in notes if note]


def provenance(runs: Sequence[Run], cells: Sequence[Cell], comparison: Comparison) -> list[str]:
    """Lines "name: value" on where the figures come from, the same whatever the format."""
    lines = [f"model: {models(cells)}"]
    for name in ("dtype", "decode", "layers", "backend"):
        lines.append(f"{name}: {_distinct(cells, name, empty='all')}")
    lines.append(f"few-shot examples: {_distinct(cells, 'num_fewshot', empty='task default')}")
    lines.append(subset_note(cells) or "items: every task whole, no limit")
    lines.append("items per task: " + ", ".join(_task_items(comparison)))
    for run in runs:
        lines.extend(run_lines(run))
    return lines


def run_lines(run: Run) -> list[str]:
    """Lines "name: value" on one run."""
    manifest = run.manifest
    lines = [
        f"run: {run.path.name}, {manifest.get('started') or 'start unknown'} to "
        f"{manifest.get('ended') or 'not ended'}"
    ]
    sessions = [s for s in manifest.get("sessions") or [] if isinstance(s, Mapping)]
    # One that found all cells done says nothing about where they were computed.
    worked = [s for s in sessions if s.get("ran", 1)] or sessions or [manifest]
    versions = worked[-1].get("versions")
    if isinstance(versions, Mapping):
        known = [f"{name} {version}" for name, version in versions.items() if version]
        lines.append("versions: " + ", ".join(known))
    commits = dict.fromkeys(_commit(session.get("git")) for session in worked)
    lines.append("commit: " + ", ".join(commits))
    machines = [_flat(session["hardware"]) for session in worked if session.get("hardware")]
    if machines:
        lines.append("hardware: " + "; ".join(dict.fromkeys(machines)))
    command = worked[-1].get("command")
    if command:
        lines.append(f"command: {' '.join(command) if isinstance(command, list) else command}")
    return lines


def _commit(git: Any) -> str:
    if not isinstance(git, Mapping) or not git.get("commit"):
        return "unknown (not run from a git clone)"
    return f"{git['commit']}" + (" with local changes" if git.get("dirty") else "")


def _task_items(comparison: Comparison) -> list[str]:
    items = []
    for task in comparison.tasks:
        counts = {point.samples for point in comparison.of_task(task) if point.samples is not None}
        items.append(f"{task} {_span(counts) if counts else 'unknown'}")
    return items


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _distinct(cells: Sequence[Cell], key: str, empty: str) -> str:
    values = {json.dumps(cell.setting.get(key)) for cell in cells}
    return ", ".join(sorted(empty if v == "null" else v.strip('"') for v in values))


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        shown = ((key, inner) for key, inner in value.items() if inner not in (None, "", [], {}))
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in shown)
    if isinstance(value, list):
        return ", ".join(_flat(inner) for inner in value)
    return str(value)
