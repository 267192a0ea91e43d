"""Workers for tests to kill, or with other versions than this process.

Little is imported here at first, so that a worker which is to die early costs little to start.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sa_patch.sweep.ray.worker import SweepWorker

# Workers of the killable class find in this folder how often to wait to be killed, a number in a
# file for a cell by its id or for "starting", and say in it who they are.
SIGNALS = "SA_PATCH_TEST_SIGNALS"


class KillableWorker(SweepWorker):
    """Waits to be killed when it starts, or in the middle of scoring a cell."""

    def __init__(self, gpus: float) -> None:
        await_death("starting")
        super().__init__(gpus)

    def compute(self, cell: Any) -> Any:
        from sa_patch.evaluation import scoring

        original = scoring.score

        def score(*arguments: Any, **settings: Any) -> Mapping[str, Any]:
            await_death(cell.id)
            return original(*arguments, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "score", score)
            return super().compute(cell)


def await_death(moment: str) -> None:
    signals = Path(os.environ[SIGNALS])
    deaths = signals / moment
    left = int(deaths.read_text()) if deaths.exists() else 0
    if left:
        deaths.write_text(str(left - 1))
        Path(signals, f"victim-{os.getpid()}").touch()
        time.sleep(600)


class OldWorker(SweepWorker):
    def describe(self) -> tuple[str, dict[str, str | None]]:
        _, versions = super().describe()
        return "node-7", versions | {"torch": "1.0"}


def killable_sweep(file: str, out: str, address: str) -> None:
    """A sweep whose workers can be killed, on a cluster that is reached by its address."""
    from sa_patch.sweep.config import load_config
    from sa_patch.sweep.plan import make_plan
    from sa_patch.sweep.ray.executor import RayExecutor
    from sa_patch.sweep.run import run_sweep

    config = load_config(file)
    executor = RayExecutor(address, worker=KillableWorker)
    run_sweep(config, make_plan(config), Path(out), executor=executor)


if __name__ == "__main__":
    # By its name as a module, so that workers can import the class too.
    from tests.sweep.ray.workers import killable_sweep as run_killable

    run_killable(*sys.argv[1:])
