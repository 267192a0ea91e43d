"""The sweep engine, end to end on a tiny random model: resume, failure, interruption, kill -9."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.evaluation import scoring
from sa_patch.files.packed import pack, stored_files, stored_text
from sa_patch.patterns import SA, parse_pattern
from sa_patch.sweep.cell_runner import load_model
from sa_patch.sweep.cells import cell_id, pattern_fields
from sa_patch.sweep.config import SweepConfig, parse_config
from sa_patch.sweep.plan import Plan, make_plan
from sa_patch.sweep.results import load_run
from sa_patch.sweep.run import Outcome, describe_plan, run_sweep
from tests.sweep.small_sweep import SETTINGS
from tests.thorough import THOROUGH


def sweep_of(checkpoint: Path, **changes: Any) -> SweepConfig:
    return parse_config({**SETTINGS, "model": str(checkpoint), **changes})


def run(config: SweepConfig, out: Path, plan: Plan | None = None) -> Outcome:
    return run_sweep(config, plan or make_plan(config), out, command=["sa-patch", "sweep"])


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """All cell files by name, without the times."""
    found = {}
    for path in sorted((folder / "cells").iterdir()):
        content = json.loads(path.read_text())
        content.pop("started")
        content.pop("seconds")
        if content["measured"]:
            content["measured"].pop("model_seconds")
            content["measured"].pop("reused_fraction")
        found[path.name] = content
    return found


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    outcome = run(sweep_of(checkpoint), out)
    assert (outcome.exit_status, outcome.ran) == (0, 5)
    return out


def test_every_cell_has_its_scores_and_measurements(unbroken: Path) -> None:
    cells = results(unbroken)
    assert len(cells) == 5
    for name, content in cells.items():
        assert name == f"{content['id']}.json" == f"{cell_id(content['cell'])}.json"
        assert (content["status"], content["error"], content["samples"]) == ("done", None, 2)
        assert content["primary"]["metric"] == "acc,none"
        assert content["primary"]["value"] == content["scores"]["acc,none"]
        assert content["primary"]["chance"] == 0.125
        (items,) = content["items"].values()
        assert len(items) == 2 and sum(items) / 2 == content["primary"]["value"]
        assert content["measured"]["tokens"] > 0
        # `auto` was asked for; prompts are short, and this is what served them.
        assert set(content["measured"]["backends"]) <= {"reference", "banded"}
        assert sum(content["measured"]["backends"].values()) > 0
    sa = next(c for c in cells.values() if c["cell"]["pattern"] == "sa:window=16,seed=1")
    assert sa["cell"] | {"window": 16, "seed": 1, "method": "sa", "limit": 2} == sa["cell"]
    assert 1 < sa["measured"]["mean_keys_per_query"] < 32


def test_the_manifest_tells_what_was_done(unbroken: Path) -> None:
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert {f"{identifier}.json" for identifier in manifest["planned"]} == set(results(unbroken))
    assert manifest["config"]["patterns"][0] == "full"
    assert manifest["ended"] is not None and manifest["versions"]["torch"]
    assert [session["ran"] for session in manifest["sessions"]] == [5]


def test_a_sweep_scores_as_lm_evals_own_command_does(checkpoint: Path, unbroken: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from sa_patch.files.packaged import tasks_dir

    config = sweep_of(checkpoint)
    lm = load_model(config.models[0], 4)
    lm.use_pattern(SA(window=16, seed=1))
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    theirs = lm_eval.simple_evaluate(lm, tasks=["needle_128"], limit=2, task_manager=manager)
    ours = next(
        content
        for content in results(unbroken).values()
        if content["cell"]["pattern"] == "sa:window=16,seed=1"
    )
    for metric, value in ours["scores"].items():
        assert theirs["results"]["needle_128"][metric] == pytest.approx(value, abs=1e-12)


def test_full_attention_and_first_seeds_come_first(checkpoint: Path) -> None:
    plan = make_plan(sweep_of(checkpoint, tasks=["needle_128", "needle_256"]))
    order = [(cell.info.name, str(cell.pattern)) for cell in plan.cells]
    assert order[0] == ("needle_128", "full")
    assert order[4] == ("needle_128", "sa:window=16,seed=1")
    assert order[5] == ("needle_256", "full")


def test_a_finished_sweep_loads_no_model(
    checkpoint: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sa_patch.sweep.cell_runner.load_model", refuse)
    before = results(unbroken)
    outcome = run(sweep_of(checkpoint), unbroken)
    assert (outcome.found, outcome.ran, outcome.exit_status) == (5, 0, 0)
    assert results(unbroken) == before


def copy_of(folder: Path, out: Path) -> Path:
    (out / "cells").mkdir(parents=True)
    for path in [folder / "manifest.json", *(folder / "cells").iterdir()]:
        (out / path.relative_to(folder)).write_bytes(path.read_bytes())
    return out


def test_a_packed_run_is_reported_and_gone_on_with(
    checkpoint: Path, unbroken: Path, tmp_path: Path
) -> None:
    out = copy_of(unbroken, tmp_path / "run")
    (again,) = sorted((out / "cells").iterdir())[:1]
    again.unlink()
    pack(out / "cells")
    assert len(load_run(out).cells) == 4
    outcome = run(sweep_of(checkpoint), out)
    assert (outcome.found, outcome.ran) == (4, 1)
    assert [path.name for path in (out / "cells").iterdir()] == [again.name]
    assert load_run(out).cells[0].value == load_run(unbroken).cells[0].value
    assert not load_run(out).missing


def test_torn_foreign_and_missing_files_are_reported_and_done_again(
    checkpoint: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(unbroken, tmp_path / "run")
    torn, foreign, missing, *_ = sorted((out / "cells").iterdir())
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    foreign.write_text('{"something": "else"}')
    missing.unlink()
    outcome = run(sweep_of(checkpoint), out)
    assert (outcome.found, outcome.ran) == (2, 3)
    shown = capfd.readouterr().err
    assert f"cells/{torn.name} is torn" in shown
    assert f"cells/{foreign.name} is not a cell file" in shown
    assert results(out) == results(unbroken)


def test_a_changed_model_or_limit_is_another_cell(checkpoint: Path, tmp_path: Path) -> None:
    from tests.tiny_checkpoint import save_tiny_checkpoint

    other = save_tiny_checkpoint(tmp_path / "other", family="qwen3")
    plans = [
        make_plan(sweep_of(checkpoint)),
        make_plan(sweep_of(checkpoint, limit=3)),
        make_plan(sweep_of(checkpoint, decode="pattern")),
        make_plan(sweep_of(checkpoint, layers=[0])),
        make_plan(sweep_of(other)),
    ]
    identifiers = [cell.id for plan in plans for cell in plan.cells]
    assert len(set(identifiers)) == len(identifiers) == 25


def test_the_resources_of_a_worker_are_no_part_of_a_cell(checkpoint: Path) -> None:
    rich = make_plan(sweep_of(checkpoint, resources={"cpus": 8, "gpus": 2}))
    plain = make_plan(sweep_of(checkpoint))
    assert [cell.id for cell in rich.cells] == [cell.id for cell in plain.cells]


def test_layers_belong_to_cells(checkpoint: Path, tmp_path: Path) -> None:
    methods = ["full", "swa", {"method": "swa", "layers": {1: "full"}}]
    config = sweep_of(checkpoint, methods=methods)
    assert run(config, tmp_path / "run").exit_status == 0
    cells = [content["cell"] for content in results(tmp_path / "run").values()]
    assert {(cell["method"], json.dumps(cell["layers"])) for cell in cells} == {
        ("full", "null"),
        ("swa", "null"),
        ("swa", '{"1": "full"}'),
    }
    measured = {
        json.dumps(content["cell"]["layers"]): content["measured"]["mean_keys_per_query"]
        for content in results(tmp_path / "run").values()
        if content["cell"]["method"] == "swa"
    }
    assert measured['{"1": "full"}'] > 1.5 * measured["null"]
    plain = make_plan(sweep_of(checkpoint, methods=["full", "swa"]))
    assert {cell.id for cell in plain.cells} < {cell.id for cell in make_plan(config).cells}
    lines = describe_plan(make_plan(config), tmp_path / "run")
    assert any(line.endswith("swa:window=16  layers 1: full  limit=2") for line in lines)


def test_cells_keep_the_names_they_had(checkpoint: Path) -> None:
    """A published run is found again: nothing may enter a cell's identity that was not there."""
    folder = Path(__file__).parents[2] / "eval" / "results" / "smollm2-135m"
    cells = [json.loads(stored_text(path)) for path in stored_files(folder / "cells")]
    assert len(cells) > 100
    for content in cells:
        fields = pattern_fields(parse_pattern(content["cell"]["pattern"]))
        assert cell_id({**content["cell"], **fields}) == content["id"]
    plan = make_plan(sweep_of(checkpoint, layers="0-1"))
    known = set(cells[0]["cell"])
    assert all(set(cell.cell) == known and cell.cell["layers"] == [0, 1] for cell in plan.cells)


def break_moba(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the cells of moba raise while they are scored."""
    original = scoring.score

    def score(lm: Any, *rest: Any) -> Mapping[str, Any]:
        if lm.pattern.name == "moba":
            print("noise before the end", file=sys.stderr)
            raise error
        return original(lm, *rest)

    monkeypatch.setattr(scoring, "score", score)


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(
    checkpoint: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config, out = sweep_of(checkpoint), tmp_path / "run"
    with monkeypatch.context() as patch:
        break_moba(patch, RuntimeError("out of\nluck"))
        outcome = run(config, out)
    assert (outcome.exit_status, outcome.ran, outcome.failed) == (1, 4, 1)
    failed = next(content for content in results(out).values() if content["status"] == "failed")
    assert failed["error"] == "RuntimeError: out of luck"
    assert failed["scores"] is failed["primary"] is failed["measured"] is None
    log = (out / "logs" / f"{failed['id']}.log").read_text()
    assert "noise before the end" in log and "Traceback" in log
    shown = capfd.readouterr().err
    assert "FAILED: RuntimeError: out of luck" in shown and "noise before" not in shown
    again = run(config, out)
    assert (again.exit_status, again.found, again.ran) == (0, 4, 1)
    assert "failed before: RuntimeError: out of luck" in capfd.readouterr().err
    assert results(out) == results(unbroken)


def test_an_interrupted_sweep_is_consistent_and_goes_on(
    checkpoint: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = sweep_of(checkpoint), tmp_path / "run"
    with monkeypatch.context() as patch:
        break_moba(patch, KeyboardInterrupt())
        outcome = run(config, out)
    assert outcome.exit_status == 130
    session = json.loads((out / "manifest.json").read_text())["sessions"][-1]
    assert (session["interrupted"], session["ran"]) == (True, outcome.ran)
    assert all(content["status"] == "done" for content in results(out).values())
    assert run(config, out).exit_status == 0
    assert results(out) == results(unbroken)


def test_layers_that_the_model_lacks_are_the_users_to_mend(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"layers \[7\]"):
        run(sweep_of(checkpoint, layers=[0, 7]), tmp_path / "run")
    assert results(tmp_path / "run") == {}


def test_a_model_that_does_not_load_is_one_sentence(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "model").mkdir()
    for path in checkpoint.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model" / "config.json").write_text('{"model_type": "frobnicator"}')
    with pytest.raises(UserError, match="could not be loaded") as caught:
        run(sweep_of(tmp_path / "model"), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_scores_that_are_not_finite_fail_their_cell(checkpoint: Path) -> None:
    info = make_plan(sweep_of(checkpoint)).cells[0].info
    with pytest.raises(ValueError, match="acc,none is not a finite number"):
        scoring.primary_score({}, info, {"acc,none": None})
    with pytest.raises(ValueError, match="no metric 'f1', only acc,none"):
        other = dataclasses.replace(info, primary_metric="f1")
        scoring.primary_score({}, other, {"acc,none": 0.5, "acc_stderr,none": 0.1})


def test_dry_run_tells_what_is_done(checkpoint: Path, unbroken: Path, tmp_path: Path) -> None:
    plan = make_plan(sweep_of(checkpoint, windows=[16, 32]))
    lines = describe_plan(plan, unbroken)
    assert lines[-1].startswith("9 cells, 5 done")
    assert sum(line.startswith("to do") for line in lines) == 4
    assert describe_plan(plan, tmp_path / "new")[-1].startswith("9 cells, 0 done")
    assert not (tmp_path / "new").exists()


def test_killed_at_random_moments_it_ends_as_if_unbroken(
    checkpoint: Path, unbroken: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({**SETTINGS, "model": str(checkpoint)}))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sa_patch", "sweep", str(sweep), "--out", str(out)]
    chance = random.Random(0)
    for _ in range(10 if THOROUGH else 2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        # The moments that matter are those with cells being written, after imports and loading.
        deadline = time.monotonic() + 120
        known = len(list((out / "cells").glob("*"))) if out.exists() else 0
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and len(list((out / "cells").glob("*"))) == known
        ):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        for path in (out / "cells").glob("*.json"):
            json.loads(path.read_text())
    # The last run is in this process, which has imported everything already.
    assert main(command[3:]) == 0
    assert results(out) == results(unbroken)
