"""A sweep goes on where it stopped: done, packed, torn, failed, interrupted and killed runs."""

import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sa_patch.cli.command import main
from sa_patch.evaluation import scoring
from sa_patch.files.packed import pack
from sa_patch.sweep.plan import make_plan
from sa_patch.sweep.results import load_run
from sa_patch.sweep.run import describe_plan, run_sweep
from tests.processes import Command
from tests.sweep.small_sweep import SETTINGS, results, run, scored, sweep_of
from tests.thorough import THOROUGH


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


def test_a_torn_line_of_a_packed_run_is_named_and_its_cell_done_again(
    checkpoint: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, out = sweep_of(checkpoint), copy_of(unbroken, tmp_path / "run")
    packed = pack(out / "cells")
    packed.write_bytes(packed.read_bytes()[:-100])
    sentence = "line 5 of cells.jsonl is torn: not a complete JSON object"
    assert any(line.startswith(sentence) for line in describe_plan(make_plan(config), out))
    (damaged,) = load_run(out).set_aside
    assert (damaged.path, damaged.damaged) == (packed, True)
    assert damaged.reason == "torn: line 5 is not a complete JSON object"
    outcome = run(config, out)
    assert (outcome.found, outcome.ran) == (4, 1)
    assert sentence in capfd.readouterr().err
    # The line is still there, but nothing is missing for it.
    assert not load_run(out).set_aside and not load_run(out).missing
    run(config, out)
    assert "torn" not in capfd.readouterr().err


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


def break_moba(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the cells of moba raise while they are scored."""
    original = scoring.score

    def score(lm: Any, *rest: Any, **settings: Any) -> Mapping[str, Any]:
        if lm.pattern.name == "moba":
            print("noise before the end", file=sys.stderr)
            raise error
        return original(lm, *rest, **settings)

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


def test_dry_run_tells_what_is_done(checkpoint: Path, unbroken: Path, tmp_path: Path) -> None:
    plan = make_plan(sweep_of(checkpoint, windows=[16, 32]))
    lines = describe_plan(plan, unbroken)
    assert lines[-1].startswith("9 cells, 5 done")
    assert sum(line.startswith("to do") for line in lines) == 4
    assert describe_plan(plan, tmp_path / "new")[-1].startswith("9 cells, 0 done")
    assert not (tmp_path / "new").exists()


def test_killed_at_random_moments_it_ends_as_if_every_prompt_had_been_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    # Under the larger window every answer is that of full attention, which killed runs have kept.
    changes = {"windows": [16, 200], "batch_size": 1}
    config = sweep_of(checkpoint, **changes)
    whole = tmp_path / "whole"
    run_sweep(config, make_plan(config), whole, reuse=False)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({**SETTINGS, "model": str(checkpoint), **changes}))
    out = tmp_path / "run"
    command = ["sweep", str(sweep), "--out", str(out)]
    chance = random.Random(0)
    for _ in range(10 if THOROUGH else 2):
        process = Command("-m", "sa_patch", *command)
        # The moments that matter are those with cells being written, after imports and loading.
        deadline = time.monotonic() + 120
        known = len(list((out / "cells").glob("*"))) if out.exists() else 0
        while (
            process.running()
            and time.monotonic() < deadline
            and len(list((out / "cells").glob("*"))) == known
        ):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        for path in (out / "cells").glob("*.json"):
            json.loads(path.read_text())
    # The last run is in this process, which has imported everything already.
    assert main(command) == 0
    assert scored(out) == scored(whole)
    cells = [json.loads(path.read_text()) for path in (out / "cells").iterdir()]
    assert any(cell["measured"]["reused_fraction"] == 1 for cell in cells)
