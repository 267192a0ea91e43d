"""The command that computes a point of a report again: the same cells, by their very ids."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sa_patch.evaluation.tasks.names import current_name
from sa_patch.sweep.cells import PROMPT_SETTINGS, cell_id
from sa_patch.sweep.results import Cell, Run

# Options of the sweep that decide which data are read and what may be run.
KEPT_FLAGS = ("--confirm-run-unsafe-code",)
KEPT_OPTIONS = ("--benchmarks",)


def remake_command(cells: Sequence[Cell], runs: Mapping[str, Run]) -> str:
    """A shell command that sweeps exactly ``cells``, the results that one point was made from.

    The sweep's file is part of it, on standard input. ``runs``: by `Cell.run`. Weights that were
    named by a branch are those which the branch has now; a cell's id tells if they differ.
    """
    first = cells[0]
    config = runs[first.run].manifest.get("config") or {}
    seen: dict[str, Any] = {}
    for cell in cells:
        seen.setdefault(_key(_task(cell)), _task(cell))
    patterns = list(dict.fromkeys(str(cell.setting["pattern"]) for cell in cells))
    layers = first.setting.get("layers")
    content: dict[str, Any] = {
        "model": _model(first, config),
        # Of lm-eval's batches, which may round differently.
        "batch_size": config.get("batch_size", 1),
        "decode": first.setting.get("decode", "full"),
        "backend": first.setting.get("backend", "auto"),
        "methods": [
            pattern if layers is None else {"method": pattern, "layers": layers}
            for pattern in patterns
        ],
        "tasks": list(seen.values()),
    }
    name = cell_id({"cells": sorted(cell.id for cell in cells)})
    words = ["sa-patch", "sweep", "-", "--out", f"runs/point-{name[:8]}", *_options(cells, runs)]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
    return f"{shlex.join(words)} <<'EOF'\n{text}EOF"


def _model(cell: Cell, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the run loaded the cell's weights."""
    name, dtype = cell.setting["model_name"], cell.setting.get("dtype", "auto")
    for spec in config.get("models") or []:
        if spec.get("pretrained") == name and spec.get("dtype") == dtype:
            # Where a cell is computed changes no result.
            kept = {key: value for key, value in spec.items() if key != "resources"}
            return {key: value for key, value in kept.items() if value is not None}
    return {"pretrained": name, "dtype": dtype}


def _task(cell: Cell) -> dict[str, Any]:
    """The settings of a cell's task, without those that are lm-eval's own."""
    kept = ("limit", "num_fewshot", *PROMPT_SETTINGS)
    settings = {
        "task": current_name(cell.setting["task"]),
        **{key: cell.setting.get(key) for key in kept},
    }
    settings["gen_kwargs"] = cell.setting.get("gen_kwargs") or None
    return {key: value for key, value in settings.items() if value is not None}


def _key(task: Mapping[str, Any]) -> str:
    return cell_id(task)


def _options(cells: Sequence[Cell], runs: Mapping[str, Run]) -> list[str]:
    """What the sweeps' own commands said of data and of code, in either spelling."""
    words: dict[str, list[str]] = {}
    for run in dict.fromkeys(cell.run for cell in cells):
        command = runs[run].manifest.get("command")
        given = [str(word) for word in command] if isinstance(command, list) else []
        for index, word in enumerate(given):
            name, joined, value = word.partition("=")
            if word in KEPT_FLAGS:
                words[word] = [word]
            elif name in KEPT_OPTIONS and (joined or index + 1 < len(given)):
                words[name] = [name, value if joined else given[index + 1]]
    return [word for option in words.values() for word in option]
