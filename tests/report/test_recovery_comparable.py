"""Which cells recovery compares, and which it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.report.recovery import recover
from sa_patch.report.recovery_items import LANGUAGE, load
from sa_patch.report.recovery_report import write_recovery
from tests.report.recovery_runs import BUDGETS, Runs

TASK = "recall_passkey_1024"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("model", "sha256:" + "cd" * 32),
        ("dtype", "bfloat16"),
        ("num_fewshot", 5),
        ("gen_kwargs", {"max_gen_toks": 8}),
        ("data", "sha256:1"),
    ],
)
def test_another_model_or_setting_is_refused(runs: Runs, name: str, other: Any) -> None:
    runs.add("swa:window=64", TASK, [1.0] * 5, 0.12, **{name: other})
    with pytest.raises(UserError, match=f"cells of one {name}"):
        runs.points()


def test_tasks_of_several_models_are_refused(runs: Runs) -> None:
    other = Runs(runs.builder.path.parent / "other")
    for pattern in ("full", "swa:window=64"):
        other.add(pattern, "stdlib_position_1024", [-1.0], 1.0, model="sha256:other")
    del runs.builder.files[next(iter(runs.builder.files))]
    runs.add("swa:window=64", TASK, [1.0] * 5, 0.12)
    with pytest.raises(UserError, match="cells of one model"):
        recover(load([runs.builder.write(), other.builder.write()]), BUDGETS)


def test_a_cell_of_two_runs_counts_once_and_two_results_of_one_pattern_are_refused(
    runs: Runs,
) -> None:
    again = Runs(runs.builder.path.parent / "again")
    for each in (runs, again):
        each.add("swa:window=64", TASK, [1.0] * 5, 0.12)
    (point,) = recover(load([runs.builder.write(), again.builder.write()]), BUDGETS)
    assert point.seeds == 1
    again.add("swa:window=64", TASK, [0.0] * 5, 0.12, decode="pattern")
    with pytest.raises(UserError, match="several results on recall_passkey_1024"):
        recover(load([runs.builder.write(), again.builder.write()]), BUDGETS)


def test_points_of_other_tasks_are_no_rivals(runs: Runs, tmp_path: Path) -> None:
    runs.add("swa:window=32", TASK, [1.0, 1.0, 1.0, 1.0, 0.0], 0.12)  # whole, on the easy task
    runs.add("swa:window=64", TASK, [1.0, 1.0, 1.0, 0.0, 0.0], 0.12)
    runs.add("swa:window=64", "recall_multikey_1024", [1.0, 0.0, 0.0, 0.0], 0.12)
    loaded = load([runs.builder.write()])
    files = write_recovery(recover(loaded, BUDGETS), loaded, tmp_path / "out")
    assert json.loads(files.json.read_text())["against_the_best"] == []
    rows = [row for row in files.markdown.read_text().splitlines() if row.startswith("| `swa")]
    assert rows[0].startswith("| `swa:window=64`") and rows[1].endswith("| - |")


def test_a_seed_has_one_luck_in_all_tasks(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tasks do not narrow what comes from seeds alone."""
    from tests.sweep import run_builder

    about = run_builder.TASKS["stdlib_position_1024"]
    names = ["stdlib_position_1024", *(f"{name}_position_1024" for name in "abc")]
    for name in names:
        monkeypatch.setitem(run_builder.TASKS, name, about)
        runs.add("full", name, [-2.0] * 4, 1.0)
        for seed, loss in ((2, 4.0), (0, 2.1), (1, 2.5))[:: 1 if name < "d" else -1]:
            runs.add(f"sa:window=64,seed={seed}", name, [-loss] * 4, 0.2)
    (point,) = runs.points()
    found = point.groups[LANGUAGE]
    # Three draws of the worst and three of the best seed: 1 in 27 each.
    assert found.low == pytest.approx(2.0 / 4.0, rel=0.02)
    assert found.high == pytest.approx(2.0 / 2.1, rel=0.02)


def test_where_nothing_can_be_recovered_one_sentence_says_so(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeless = Runs(tmp_path / "hopeless")
    for pattern in ("full", "swa:window=64"):
        hopeless.add(pattern, TASK, [0.0] * 5, 1.0)
    for folder in (runs.builder.write(), hopeless.builder.write()):
        assert main(["recovery", str(folder)]) == 2
        assert "recovery needs a pattern beside full attention" in capsys.readouterr().err
    runs.add("swa:window=64", TASK, [1.0] * 5, 0.12)
    (tmp_path / "file").write_text("")
    assert main(["recovery", str(runs.builder.write()), "--out", str(tmp_path / "file")]) == 2
    assert "name a folder you may write with --out" in capsys.readouterr().err
