"""Run folders whose cells hold item scores, for tests of recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sa_patch.report.recovery import recover
from sa_patch.report.recovery_items import load
from tests.sweep.run_builder import RunBuilder

BUDGETS = (1 / 16, 1 / 8, 1 / 4)
OWN_TASKS: dict[str, tuple[str, float | None, float, int]] = {
    "stdlib_position_1024": ("perplexity,none", None, 8.0, 1024),
    "recall_passkey_1024": ("acc,none", 0.0, 1.0, 1000),
    "recall_multikey_1024": ("acc,none", 0.125, 0.9, 1000),
}


class Runs:
    """A run folder whose cells hold item scores."""

    def __init__(self, path: Path) -> None:
        self.builder = RunBuilder(path)

    def add(self, pattern: str, task: str, items: list[float], share: float, **more: Any) -> None:
        name = self.builder.add(pattern, task, float(np.mean(items)), share=share, **more)
        self.builder.files[name]["items"] = {task: items}

    def points(self, budgets: tuple[float, ...] = BUDGETS) -> list:
        return recover(load([self.builder.write()]), budgets)
