"""Cells in several processes: the same results, an end in time, and a process that dies."""

import os
import signal
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.sweep.executor import Finished
from sa_patch.sweep.plan import make_plan
from sa_patch.sweep.processes import ProcessExecutor
from sa_patch.sweep.run import run_sweep
from tests.processes import FORK_SERVER
from tests.sweep.small_sweep import results, sweep_of


@pytest.fixture
def started_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes come from the tests' fork server; the last test here starts one as users do."""
    monkeypatch.setattr("multiprocessing.get_context", lambda method: FORK_SERVER)


@pytest.mark.usefixtures("started_quickly")
def test_two_processes_score_as_one_does(checkpoint: Path, tmp_path: Path) -> None:
    config = sweep_of(checkpoint, tasks=["needle_128", "needle_256"])
    plan = make_plan(config)
    run_sweep(config, plan, tmp_path / "one")
    outcome = run_sweep(config, plan, tmp_path / "two", executor=ProcessExecutor(2))
    assert (outcome.ran, outcome.failed) == (10, 0)
    assert results(tmp_path / "one") == results(tmp_path / "two")


def test_nothing_is_waited_for_when_time_is_up(checkpoint: Path, tmp_path: Path) -> None:
    config = sweep_of(checkpoint)
    plan = make_plan(config)
    executor = ProcessExecutor(1, seconds=0)
    outcome = run_sweep(config, plan, tmp_path / "run", executor=executor)
    assert (outcome.ran, outcome.failed, outcome.interrupted) == (0, 0, False)
    assert not any(worker.process.is_alive() for worker in executor._workers)
    outcome = run_sweep(config, plan, tmp_path / "run")
    assert outcome.ran == 5


@pytest.mark.usefixtures("started_quickly")
def test_a_process_that_dies_costs_its_cell(checkpoint: Path) -> None:
    config = sweep_of(checkpoint)
    plan = make_plan(config)
    executor = ProcessExecutor(2)
    finished = []
    killed = None
    for event in executor.run(config, plan, plan.cells, run_code=False):
        if isinstance(event, Finished):
            finished.append(event)
        busy = [worker for worker in executor._workers if worker.cell is not None]
        if killed is None and busy:
            killed = busy[0].cell
            os.kill(busy[0].process.pid or 0, signal.SIGKILL)
    failed = [event.cell for event in finished if event.computed.content["status"] == "failed"]
    assert len(finished) == 5 and failed == [killed]


def test_what_the_model_cannot_take_is_said(checkpoint: Path) -> None:
    config = sweep_of(checkpoint, layers="0-99")
    plan = make_plan(config)
    with pytest.raises(UserError, match="layer"):
        list(ProcessExecutor(1).run(config, plan, plan.cells, run_code=False))
