"""Fixtures of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.recovery_runs import OWN_TASKS, Runs
from tests.sweep import run_builder


@pytest.fixture
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of this package, at 1,024 tokens, known to the builder of runs."""
    for task, about in OWN_TASKS.items():
        monkeypatch.setitem(run_builder.TASKS, task, about)


@pytest.fixture
def runs(own_tasks: None, tmp_path: Path) -> Runs:
    """Full attention's cells."""
    found = Runs(tmp_path / "run")
    found.add("full", "stdlib_position_1024", [-2.0, -2.2, -1.8, -2.0], 1.0)
    found.add("full", "recall_passkey_1024", [1.0, 1.0, 1.0, 1.0, 0.0], 1.0)
    found.add("full", "recall_multikey_1024", [1.0, 1.0, 1.0, 0.0], 1.0)
    found.add("full", "arc_easy", [1.0, 1.0, 1.0, 1.0], 1.0)
    return found
