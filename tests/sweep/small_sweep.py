"""A sweep of seconds, for tests of the engines that run it."""

import json
from pathlib import Path
from typing import Any

from sa_patch.sweep.config import SweepConfig, parse_config
from sa_patch.sweep.plan import Plan, make_plan
from sa_patch.sweep.run import Outcome, run_sweep

SETTINGS: dict[str, Any] = {
    "windows": [16],
    "methods": ["full", "swa", {"method": "sa", "seeds": [0, 1]}, {"method": "moba", "topk": 2}],
    "tasks": ["needle_128"],
    "limit": 2,
    "batch_size": 4,
    "dtype": "float32",
}


def sweep_of(checkpoint: Path, **changes: Any) -> SweepConfig:
    return parse_config({**SETTINGS, "model": str(checkpoint), **changes})


def run(config: SweepConfig, out: Path, plan: Plan | None = None) -> Outcome:
    return run_sweep(config, plan or make_plan(config), out, command=["sa-patch", "sweep"])


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """All cell files by name, without what belongs to the machine and the hour."""
    found = {}
    for path in sorted((folder / "cells").iterdir()):
        content = json.loads(path.read_text())
        for key in ("started", "seconds", "hardware"):
            content.pop(key)
        if content["measured"]:
            content["measured"].pop("model_seconds")
            content["measured"].pop("reused_fraction")
        found[path.name] = content
    return found


def scored(folder: Path) -> dict[str, dict[str, Any]]:
    """`results` without what depends on the calls that were made, and not on the answers alone."""
    found = results(folder)
    for content in found.values():
        for name in ("backends", "visited_keys", "full_visited_keys", "choosing_keys"):
            content["measured"].pop(name)
    return found
