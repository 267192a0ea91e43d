"""Reading run folders, and the arithmetic over seeds and tasks, against hand computations."""

import json
import math
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.report.aggregate import Comparison, Point, compare
from sa_patch.sweep.results import load_run, merge_cells
from tests.sweep.run_builder import RunBuilder


def compared(builder: RunBuilder) -> Comparison:
    return compare(load_run(builder.write()).cells)


def point(comparison: Comparison, label: str, window: int | None, task: str) -> Point:
    points = comparison.averages if task == "average" else comparison.points
    (found,) = [
        p for p in points if p.series.label == label and p.window == window and p.task == task
    ]
    return found


def test_whole_run_is_read_in_the_order_of_its_plan(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    ids = [builder.add(f"swa:window={w}", "hellaswag", 0.3) for w in (64, 16, 32)]
    run = load_run(builder.write())
    assert [cell.id for cell in run.cells] == ids
    assert run.missing == () and run.set_aside == ()
    cell = run.cells[0]
    assert (cell.metric, cell.value, cell.samples, cell.chance) == (
        "acc_norm,none",
        0.3,
        50,
        0.25,
    )
    assert cell.full_flops == 1e6 * 105**2  # per sequence: the file holds the sum over 200
    assert cell.flops == 0.5 * 1e6 * 105**2


def test_untrusted_files_are_listed_with_their_reason_and_never_used(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    good = builder.add("full", "hellaswag", 0.36)
    torn = builder.add("swa:window=16", "hellaswag", 0.3)
    failed = builder.add("swa:window=32", "hellaswag", 0.3, status="failed")
    edited = builder.add("swa:window=64", "hellaswag", 0.3)
    absent = builder.add("swa:window=128", "hellaswag", 0.3, written=False)
    endless = builder.add("swa:window=256", "hellaswag", 0.3)
    old = builder.add("swa:window=512", "hellaswag", 0.3)
    builder.files[edited]["cell"]["window"] = 65
    builder.files[endless]["primary"]["value"] = math.inf
    builder.files[old]["schema"] = 0
    stranger = RunBuilder(tmp_path / "other").add("full", "boolq", 0.5)
    run_path = builder.write()
    cells = run_path / "cells"
    (cells / f"{torn}.json").write_text((cells / f"{torn}.json").read_text()[:200])
    (cells / "notes.json").write_text("[1, 2]")
    (cells / f"{stranger}.json").write_text("{}")
    (cells / ".half-written.tmp").write_text("{")

    run = load_run(run_path)

    assert [cell.id for cell in run.cells] == [good]
    reasons = {aside.path.stem: aside.reason for aside in run.set_aside}
    assert reasons == {
        torn: "torn: not a complete JSON file",
        failed: "failed: RuntimeError: out of memory",
        edited: "foreign: its name is not the hash of the cell it describes",
        endless: "failed: its primary score is not a finite number",
        old: "foreign: schema 0, this version reads 1",
        "notes": "foreign: not a cell file of sa-patch",
        stranger: "foreign: not a cell file of sa-patch",
    }
    assert set(run.missing) == {torn, failed, edited, absent, endless, old}


def test_cell_outside_the_plan_is_foreign(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    planned = builder.add("full", "hellaswag", 0.36)
    left_over = builder.add("full", "hellaswag", 0.5, limit=5)
    run = load_run(builder.write(planned=[planned]))
    assert [cell.id for cell in run.cells] == [planned]
    assert run.set_aside[0].path.stem == left_over
    assert "not in the plan" in run.set_aside[0].reason


@pytest.mark.parametrize("damage", ["cell", "primary", "measured", "window", "model"])
def test_file_with_the_right_name_but_wrong_content_is_set_aside(
    tmp_path: Path, damage: str
) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "hellaswag", 0.36)
    other: dict[str, object] = {damage: "many" if damage == "window" else 7}
    if damage in ("window", "model"):
        bad = builder.add("swa:window=16", "hellaswag", 0.3, **other)  # type: ignore[arg-type]
    else:
        bad = builder.add("swa:window=16", "hellaswag", 0.3)
        builder.files[bad].update(other)
    run = load_run(builder.write())
    assert [aside.path.stem for aside in run.set_aside] == [bad]


def test_unusable_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder at .*nowhere"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder.*manifest.json"):
        load_run(tmp_path)
    empty = RunBuilder(tmp_path / "empty").write()
    with pytest.raises(UserError, match="nothing to report.*no cell has been finished yet"):
        load_run(empty)
    (empty / "cells" / "0123456789abcdef.json").write_text('{"schema": 1, "id"')
    with pytest.raises(UserError, match="nothing to report.*1 cell files.*torn"):
        load_run(empty)
    (empty / "manifest.json").write_text('{"planned": [')
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        load_run(empty)
    (empty / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="not a run's manifest"):
        load_run(empty)


def test_one_seed_point_has_only_the_sampling_error(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "hellaswag", 0.36, stderr=0.05)
    builder.add("swa:window=16", "hellaswag", 0.36, samples=50)  # lm-eval gave none: binomial
    comparison = compared(builder)
    assert point(comparison, "Full attention", None, "hellaswag").error == 0.05
    swa = point(comparison, "SWA", 16, "hellaswag")
    assert swa.seed_error is None
    assert swa.error == pytest.approx(math.sqrt(0.36 * 0.64 / 49))


def test_error_over_seeds_joins_seed_variance_and_sampling(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for seed, value, stderr in ((0, 0.30, 0.03), (1, 0.36, 0.04), (2, 0.33, 0.05)):
        builder.add(f"sa:window=16,seed={seed}", "hellaswag", value, stderr=stderr)
    sa = point(compared(builder), "SA", 16, "hellaswag")
    assert sa.value == pytest.approx(0.33)
    assert sa.seeds == (0, 1, 2)
    assert sa.pattern == "sa:window=16"
    assert sa.seed_error == pytest.approx(0.03 / math.sqrt(3))  # deviations -.03, 0, .03
    assert sa.sampling_error == pytest.approx(math.sqrt((0.0009 + 0.0016 + 0.0025) / 3))
    assert sa.error == pytest.approx(math.sqrt(0.0009 / 3 + 0.005 / 3))


def test_average_is_over_tasks_per_seed_and_never_holds_a_perplexity(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    values = {"hellaswag": (0.30, 0.40), "boolq": (0.50, 0.54)}
    for task, (first, second) in values.items():
        builder.add("full", task, 0.6, stderr=0.02)
        builder.add("sa:window=16,seed=0", task, first, stderr=0.03)
        builder.add("sa:window=16,seed=1", task, second, stderr=0.04)
    for pattern in ("full", "sa:window=16,seed=0", "sa:window=16,seed=1"):
        builder.add(pattern, "stdlib_perplexity", 20.0, stderr=1.0)
    comparison = compared(builder)
    assert comparison.average_tasks == ("hellaswag", "boolq")
    assert comparison.left_out == {"stdlib_perplexity": "not an accuracy"}
    full = point(comparison, "Full attention", None, "average")
    assert full.value == pytest.approx(0.6)
    assert full.error == pytest.approx(math.sqrt(0.0004 + 0.0004) / 2)
    assert full.chance == pytest.approx(0.375)
    sa = point(comparison, "SA", 16, "average")
    assert sa.value == pytest.approx(0.435)  # seeds: 0.40 and 0.47
    assert sa.seed_error == pytest.approx(0.035)  # their standard deviation 0.0495 / sqrt(2)
    assert sa.sampling_error == pytest.approx(math.sqrt(0.00125 + 0.00125) / 2)
    assert sa.error == pytest.approx(math.hypot(0.035, math.sqrt(0.0025) / 2))
    assert sa.samples == 100


def test_average_uses_only_tasks_that_every_point_has(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for pattern in ("full", "swa:window=16", "swa:window=32"):
        builder.add(pattern, "hellaswag", 0.3)
        builder.add(pattern, "boolq", 0.5, written=pattern != "swa:window=32")
    comparison = compared(builder)
    assert comparison.average_tasks == ("hellaswag",)
    assert comparison.left_out == {"boolq": "no result yet for SWA at window 32"}
    assert point(comparison, "SWA", 16, "average").value == pytest.approx(0.3)
    assert point(comparison, "SWA", 16, "boolq").value == pytest.approx(0.5)


def test_average_uses_only_seeds_that_all_its_tasks_have(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("sa:window=16,seed=0", "hellaswag", 0.3)
    builder.add("sa:window=16,seed=1", "hellaswag", 0.4)
    builder.add("sa:window=16,seed=0", "boolq", 0.5)
    builder.add("sa:window=16,seed=1", "boolq", 0.6, written=False)
    average = point(compared(builder), "SA", 16, "average")
    assert average.seeds == (0,)
    assert average.value == pytest.approx(0.4)


def test_no_shared_task_gives_no_average(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "hellaswag", 0.3)
    builder.add("swa:window=16", "boolq", 0.5)
    comparison = compared(builder)
    assert comparison.averages == () and comparison.average_tasks == ()
    assert set(comparison.left_out) == {"hellaswag", "boolq"}


def test_variants_of_a_method_are_series_of_their_own(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for pattern in (
        "full",
        "moba:block_size=32,topk=2",
        "moba:block_size=16,topk=4",
        "sa:window=64,seed=0",
        "sa:window=64,seed=0,circular=False",
        "swa:window=64",
        "swa:window=64,sinks=4",
        "mix:window=64,local=0.5,seed=1",
    ):
        builder.add(pattern, "hellaswag", 0.3)
    labels = [series.label for series in compared(builder).series]
    assert labels == [
        "Full attention",
        "SA",
        "SA (circular=False)",
        "SWA",
        "SWA (sinks=4)",
        "MoBA (topk=2)",
        "MoBA (topk=4)",
        "mix (local=0.5)",
    ]


def test_runs_that_differ_in_a_setting_are_told_apart_by_it(tmp_path: Path) -> None:
    runs = []
    for decode in ("full", "pattern"):
        builder = RunBuilder(tmp_path / decode, decode=decode)
        builder.add("full", "hellaswag", 0.36)
        builder.add("swa:window=16", "hellaswag", 0.3)
        runs.append(load_run(builder.write()))
    cells, _ = merge_cells(runs)
    comparison = compare(cells)
    assert [series.label for series in comparison.series] == [
        "Full attention",
        "SWA, decode full",
        "SWA, decode pattern",
    ]
    # Decoding sees every key under full attention anyway: its second cell says nothing new.
    assert [cell.run for cell in comparison.repeated] == [str(tmp_path / "pattern")]


def test_models_and_limits_are_never_mixed(tmp_path: Path) -> None:
    runs = []
    for name, limit in (("a", 50), ("b", 100)):
        builder = RunBuilder(tmp_path / name, model_name=name, model=f"sha256:{name}", limit=limit)
        builder.add("full", "hellaswag", 0.36)
        runs.append(load_run(builder.write()))
    comparison = compare(merge_cells(runs)[0])
    assert [series.label for series in comparison.series] == [
        "Full attention, a",
        "Full attention, b",
    ]
    assert comparison.tasks == ("hellaswag (limit 50)", "hellaswag (limit 100)")
    assert comparison.averages == ()


def test_one_cell_in_two_runs_counts_once_and_a_contradiction_is_told(tmp_path: Path) -> None:
    runs = []
    for name, value in (("a", 0.36), ("b", 0.30)):
        builder = RunBuilder(tmp_path / name)
        builder.add("full", "hellaswag", value)
        builder.add("full", "boolq", 0.5)
        runs.append(load_run(builder.write()))
    cells, repeated = merge_cells(runs)
    assert [cell.value for cell in cells] == [0.36, 0.5]
    (aside,) = repeated
    assert aside.path.parent.parent == tmp_path / "b"
    assert "another value (0.36, here 0.3)" in aside.reason


def test_saturation_threshold_and_the_full_baseline(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "hellaswag", 0.36, saturated=1.0)
    builder.add("swa:window=16", "hellaswag", 0.3, saturated=0.49)
    builder.add("swa:window=32", "hellaswag", 0.3, saturated=0.5)
    comparison = compared(builder)
    assert [p.saturated for p in comparison.points] == [False, False, True]
