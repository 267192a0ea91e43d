"""Sweeps on a local Ray cluster of two workers: the local engine's results, whatever dies."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.models.quiet_output import CapturedOutput, silenced
from sa_patch.sweep.config import SweepConfig, load_config, parse_config
from sa_patch.sweep.plan import PlannedCell, make_plan
from sa_patch.sweep.ray import executor as ray_executor
from sa_patch.sweep.ray.executor import RayExecutor
from sa_patch.sweep.ray.worker import Job, SweepWorker
from sa_patch.sweep.run import Outcome, run_sweep
from tests.processes import Command
from tests.sweep.ray.workers import SIGNALS, KillableWorker, OldWorker
from tests.sweep.small_sweep import SETTINGS, results
from tests.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parents[3]
METHODS = ["full", "swa", {"method": "moba", "topk": 2}]
# Starts workers' deaths, and returns who was killed.
Killing = Callable[[Mapping[str, int]], list[int]]


@pytest.fixture(scope="module")
def signals() -> Iterator[Path]:
    # Short: the paths of Ray's sockets below it may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="sar", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray(signals: Path, one_thread: None) -> Iterator[Any]:
    """A cluster of its own, with room for two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(SIGNALS, str(signals))
        ray = pytest.importorskip("ray")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(signals / "ray"),
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def models(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    other = save_tiny_checkpoint(tmp_path_factory.mktemp("other"), family="qwen3")
    return [str(checkpoint), str(other)]


@pytest.fixture(scope="module")
def local(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same grid, computed in this process."""
    out = tmp_path_factory.mktemp("local") / "run"
    assert sweep(grid(models), out).exit_status == 0
    return out


def grid(models: Sequence[str], **changes: Any) -> SweepConfig:
    return parse_config({**SETTINGS, "methods": METHODS, "model": list(models), **changes})


def cell_of(config: SweepConfig, method: str, model: str) -> PlannedCell:
    (cell,) = (
        cell
        for cell in make_plan(config).cells
        if (cell.cell["method"], cell.model.pretrained) == (method, model)
    )
    return cell


def sweep(config: SweepConfig, out: Path, executor: RayExecutor | None = None) -> Outcome:
    return run_sweep(config, make_plan(config), out, executor=executor)


@pytest.fixture
def killing(signals: Path) -> Iterator[Killing]:
    """Call it with moments of `KillableWorker` and how many workers are to be killed at each."""
    killed: list[int] = []
    planned: list[str] = []
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            for victim in signals.glob("victim-*"):
                victim.unlink()
                killed.append(int(victim.name.partition("-")[2]))
                os.kill(killed[-1], signal.SIGKILL)

    def start(deaths: Mapping[str, int]) -> list[int]:
        planned.extend(deaths)
        for moment, number in deaths.items():
            (signals / moment).write_text(str(number))
        thread.start()
        return killed

    thread = threading.Thread(target=kill, daemon=True)
    yield start
    over.set()
    thread.join()
    for moment in planned:
        (signals / moment).unlink()


def test_workers_that_die_cost_a_retry_or_their_cell_and_nothing_else(
    ray: Any,
    models: list[str],
    local: Path,
    tmp_path: Path,
    killing: Killing,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []

    @contextlib.contextmanager
    def looked_at() -> Iterator[CapturedOutput]:
        with silenced() as output:
            yield output
            # What comes later comes on the connection of this module, which stays open.
            shown.extend(capfd.readouterr())

    monkeypatch.setattr(ray_executor, "silenced", looked_at)
    monkeypatch.setattr(ray_executor, "RETRIES", 1)
    config = grid(models)
    once, twice = cell_of(config, "swa", models[0]), cell_of(config, "moba", models[1])
    killed = killing({once.id: 1, twice.id: 2})
    outcome = sweep(config, tmp_path / "run", RayExecutor(worker=KillableWorker))
    assert (outcome.exit_status, outcome.ran, outcome.failed, len(killed)) == (1, 5, 1, 3)

    out, err = shown
    assert "swa:window=16: its worker died and it is tried again" in err
    assert "FAILED: WorkerDied" in err
    # What Ray itself says of it is kept off the screen.
    assert "(raylet)" not in out + err
    cells = results(tmp_path / "run")
    (failed,) = [content for content in cells.values() if content["status"] == "failed"]
    assert failed["id"] == twice.id and failed["scores"] is failed["measured"] is None
    assert failed["error"].startswith("WorkerDied: 2 workers died while they computed it; Actor")
    assert (tmp_path / "run" / "logs" / f"{failed['id']}.log").read_text()
    scored = tmp_path / "run" / "cells" / f"{once.id}.json"
    hardware = json.loads(scored.read_text())["hardware"]
    assert hardware["gpus"] == [] and hardware["torch_threads"] == 1

    # The same command, here in this process, does what is missing.
    again = sweep(config, tmp_path / "run")
    assert (again.exit_status, again.found, again.ran) == (0, 5, 1)
    assert results(tmp_path / "run") == results(local)


def test_a_model_whose_workers_die_before_it_is_loaded_ends_the_sweep(
    ray: Any,
    models: list[str],
    tmp_path: Path,
    killing: Killing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_executor, "RETRIES", 1)
    killed = killing({"starting": 20})
    config = grid(models[:1], methods=["full"])
    with pytest.raises(UserError, match="2 workers died one after another before they had loaded"):
        sweep(config, tmp_path / "run", RayExecutor(worker=KillableWorker))
    assert len(killed) == 2
    assert results(tmp_path / "run") == {}


def test_a_killed_driver_loses_what_was_in_flight_and_the_same_command_goes_on(
    ray: Any, models: list[str], local: Path, tmp_path: Path, signals: Path
) -> None:
    file, out = tmp_path / "sweep.yaml", tmp_path / "run"
    one_worker = {**SETTINGS, "methods": METHODS, "model": models[0], "resources": {"cpus": 2}}
    file.write_text(yaml.safe_dump(one_worker))
    address = ray.get_runtime_context().gcs_address
    last = signals / cell_of(load_config(str(file)), "moba", models[0]).id
    last.write_text("1")
    driver = Command("-m", "tests.sweep.ray.workers", str(file), str(out), address, cwd=ROOT)
    # The worker is now in the middle of a cell.
    wait_until(lambda: any(signals.glob("victim-*")) or not driver.running())
    driver.kill()
    assert driver.process.exitcode == -signal.SIGKILL
    before = len(list(out.glob("cells/*.json")))
    assert before < 3
    # The worker ends with the driver: all of the cluster is free again.
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 2)
    for victim in signals.glob("victim-*"):
        victim.unlink()
    last.unlink()
    assert main(["sweep", str(file), "--out", str(out), "--ray"]) == 0
    session = json.loads((out / "manifest.json").read_text())["sessions"][-1]
    assert session["ran"] == 3 - before > 0
    done = results(out)
    assert len(done) == 3
    assert done == {name: content for name, content in results(local).items() if name in done}


def wait_until(true: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def test_a_machine_with_other_versions_is_refused(
    ray: Any, models: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        sweep(grid(models[:1], methods=["full"]), tmp_path / "run", RayExecutor(worker=OldWorker))
    torch = importlib.metadata.version("torch")
    assert str(caught.value) == (
        f"on node-7: it has torch 1.0 and not {torch}; install the same on every machine"
    )


def test_other_weights_or_data_than_planned_are_refused(models: list[str], tmp_path: Path) -> None:
    config = grid(models[:1], methods=["full"])
    (cell,) = make_plan(config).cells

    def prepared(model: str, data: str | None) -> str | None:
        changed = dataclasses.replace(cell, cell={**cell.cell, "model": model, "data": data})
        job = Job(config, config.models[0], (changed,), tmp_path, False, None)
        return SweepWorker(gpus=1).prepare(job)

    model = cell.cell["model"]
    assert prepared(model, None) is None
    assert f"({model}, not sha256:0)" in str(prepared("sha256:0", None))
    said = str(prepared(model, "0123"))
    assert f"the data of needle_128 in {tmp_path} is not the one that the sweep was" in said


def test_layers_that_are_not_there_end_the_sweep(
    ray: Any, models: list[str], tmp_path: Path
) -> None:
    config = grid(models[:1], layers=[0, 7], resources={"cpus": 2})
    with pytest.raises(UserError, match=r"layers \[7\]"):
        sweep(config, tmp_path / "run", RayExecutor())
    assert results(tmp_path / "run") == {}


def test_more_than_any_machine_has_is_one_sentence(
    ray: Any, models: list[str], tmp_path: Path
) -> None:
    config = grid(models[:1], resources={"cpus": 3, "gpus": 1})
    with pytest.raises(UserError, match="has the 3 CPUs and 1 GPUs that a worker of") as caught:
        sweep(config, tmp_path / "run", RayExecutor())
    assert "all machines together: 2 CPUs, 0 GPUs" in str(caught.value)


def test_a_finished_sweep_does_not_connect(local: Path, models: list[str]) -> None:
    executor = RayExecutor("auto", worker=SweepWorker)
    executor._address = "nowhere:1"
    assert sweep(grid(models), local, executor).found == 6
