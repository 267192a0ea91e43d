"""What recovery needs of runs: item scores and costs of every pattern on every task."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa_patch.errors import UserError
from sa_patch.files.packed import stored_text
from sa_patch.report.series import strip_parameters
from sa_patch.sweep.results import Cell, Run

LANGUAGE, RETRIEVAL, BENCHMARKS = "language modelling", "retrieval", "benchmarks"
GROUPS = (LANGUAGE, RETRIEVAL, BENCHMARKS)


@dataclass(frozen=True)
class Items:
    """Scores of one pattern on one task.

    Args:
        scores: float64 ``[seeds, items]``; for perplexities mean log-likelihoods of a token.
        share: measured attention FLOPs as a share of full attention's.
        visited: likewise of what tiles of queries read; None for runs that did not count it.
        mean_keys: measured keys per query.
    """

    scores: NDArray[np.float64]
    share: float
    visited: float | None
    mean_keys: float


def group_of(task: str, metric: str) -> str:
    """The group that a task belongs to."""
    if "perplexity" in metric:
        return LANGUAGE
    return RETRIEVAL if length_of(task) is not None else BENCHMARKS


def length_of(task: str) -> int | None:
    """The length in a task's name (``passkey_4096``), None without one."""
    found = re.search(r"_(\d{3,})$", task)
    return int(found[1]) if found else None


# What cells of one pattern, or those of its kernels, may differ in; all else must agree.
_FREE = {
    "pattern",
    "method",
    "window",
    "seed",
    "layers",
    "limit",
    "model_name",
    "backend",
    "decode",
}


def read_items(runs: Iterable[Run]) -> dict[tuple[str, str], dict[str, list[tuple[Cell, Any]]]]:
    """Cells with their item scores, by (pattern without seed, layers) and task.

    A cell that several runs hold counts once.

    Raises:
        UserError: if a cell has no item scores, or cells are of several models or settings.
    """
    found: dict[tuple[str, str], dict[str, list[tuple[Cell, Any]]]] = {}
    known: dict[str, Cell] = {}
    for run in runs:
        for cell in run.cells:
            if known.setdefault(cell.id, cell) is not cell:
                continue
            path = run.path / "cells" / f"{cell.id}.json"
            data = json.loads(stored_text(path))
            items = data.get("items")
            if "items" in data and items is None:
                # Its score is no mean of items, such as byte perplexity.
                continue
            if not items:
                raise UserError(
                    f"{path} holds no scores of single items, which paired intervals need; cells "
                    "of earlier versions lack them: run the sweep again in a new folder"
                )
            layers = cell.setting.get("layers")
            key = (
                strip_parameters(cell.setting["pattern"], ("seed",)),
                "all" if layers is None or cell.method == "full" else json.dumps(layers),
            )
            found.setdefault(key, {}).setdefault(cell.task, []).append((cell, items))
    _check_alike([of_task for by_task in found.values() for of_task in by_task.values()])
    return found


def _check_alike(groups: Iterable[Sequence[tuple[Cell, Any]]]) -> None:
    """Refuse cells that cannot stand side by side, or twice for one seed of a pattern."""
    first: dict[str, Cell] = {}
    for group in groups:
        seeds = set()
        for cell, _ in group:
            one = first.setdefault(cell.task, cell)
            names = sorted({*one.setting, *cell.setting} - _FREE)
            _refuse_other(one, cell, names)
            _refuse_other(next(iter(first.values())), cell, ("model", "dtype"))
            if cell.method != "full" and cell.setting["seed"] in seeds:
                raise UserError(
                    f"{cell.setting['pattern']} has several results on {cell.task} (another "
                    "--limit, decode or backend); give one run of it"
                )
            seeds.add(cell.setting["seed"])


def _refuse_other(one: Cell, other: Cell, names: Iterable[str]) -> None:
    for name in names:
        if one.setting.get(name) != other.setting.get(name):
            raise UserError(
                f"recovery compares cells of one {name}; got {one.setting.get(name)!r} and "
                f"{other.setting.get(name)!r} ({other.task}): give the runs one by one"
            )


def scores_of(items: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
    """The scores of a cell's items, by sub-task in the order of their names: ``[items]``."""
    return np.concatenate([np.asarray(items[name], float) for name in sorted(items)])


def items_of(cells: Sequence[tuple[Cell, Any]]) -> Items:
    """The seeds of one pattern on one task, one row each, in order: they pair over tasks."""
    rows = []
    cells = sorted(cells, key=lambda found: found[0].setting["seed"] or 0)
    for _, items in cells:
        rows.append(scores_of(items))
    if len({len(row) for row in rows}) > 1:
        task = cells[0][0].task
        raise UserError(
            f"the seeds of {cells[0][0].setting['pattern']} were run on different numbers of items "
            f"of {task}; finish the sweep, or run all of them with one --limit"
        )
    shares = [cell.flops / cell.full_flops for cell, _ in cells if cell.flops and cell.full_flops]
    keys = [cell.mean_keys for cell, _ in cells if cell.mean_keys is not None]
    visited = [cell.visited_share for cell, _ in cells if cell.visited_share is not None]
    return Items(
        np.stack(rows),
        float(np.mean(shares)),
        float(np.mean(visited)) if visited else None,
        float(np.mean(keys)),
    )


def load(paths: Sequence[Path]) -> list[Run]:
    """The runs of some folders; a folder without a manifest stands for the runs inside it."""
    from sa_patch.sweep.results import load_run

    folders: list[Path] = []
    for path in paths:
        inner = sorted(found.parent for found in path.glob("*/manifest.json"))
        folders += inner if inner and not (path / "manifest.json").exists() else [path]
    return [load_run(folder) for folder in folders]
