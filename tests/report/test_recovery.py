"""Recovery at equal FLOPs: its definition by hand, pairing, budgets, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sa_patch.cli.command import main
from sa_patch.errors import UserError
from sa_patch.report.recovery import difference, parse_budgets, recover
from sa_patch.report.recovery_figures import composition, draw, draw_ranking
from sa_patch.report.recovery_items import BENCHMARKS, LANGUAGE, RETRIEVAL, load
from sa_patch.report.recovery_report import write_recovery
from tests.pictures import DRAWN, coloured
from tests.report.recovery_runs import BUDGETS, Runs
from tests.sweep import run_builder

pytestmark = pytest.mark.usefixtures("own_tasks")


def test_recovery_is_its_definition(runs: Runs) -> None:
    runs.add("swa:window=64", "stdlib_position_1024", [-2.5, -2.5, -2.5, -2.5], 0.12)
    runs.add("swa:window=64", "recall_passkey_1024", [0.0, 1.0, 1.0, 0.0, 0.0], 0.12)
    runs.add("swa:window=64", "recall_multikey_1024", [1.0, 0.0, 0.0, 0.0], 0.12)
    runs.add("swa:window=64", "arc_easy", [1.0, 1.0, 1.0, 0.0], 0.9)
    (point,) = runs.points()
    assert point.groups[LANGUAGE].value == pytest.approx(2.0 / 2.5)
    passkey, multikey = 0.4 / 0.8, (0.25 - 0.125) / (0.75 - 0.125)
    assert point.tasks["recall_passkey_1024"] == pytest.approx(passkey)
    assert point.groups[RETRIEVAL].value == pytest.approx((passkey + multikey) / 2)
    assert point.groups[BENCHMARKS].value == pytest.approx((0.75 - 0.25) / (1.0 - 0.25))
    assert point.mean.value == pytest.approx(np.mean([g.value for g in point.groups.values()]))
    # Benchmarks are short: what a pattern spends is measured where it was sized.
    assert (point.n, point.budget, point.share) == (1024, 1 / 8, pytest.approx(0.12))


def test_seeds_are_averaged_and_drawn(runs: Runs) -> None:
    for seed, loss in enumerate([2.1, 2.5, 4.0]):
        runs.add(f"sa:window=64,seed={seed}", "stdlib_position_1024", [-loss] * 4, 0.2)
    (point,) = runs.points()
    assert point.seeds == 3 and point.budget == 1 / 4
    found = point.groups[LANGUAGE]
    assert found.value == pytest.approx(2.0 / np.mean([2.1, 2.5, 4.0]))
    # The pattern's items are all alike: the width comes from the seeds and the full model's items.
    assert found.low < 2.0 / 3.5 and found.high > 2.0 / 2.2


def test_intervals_are_paired(runs: Runs) -> None:
    generator = np.random.default_rng(0)
    hard = generator.normal(2.5, 0.8, 60)
    full = Runs(runs.builder.path.parent / "paired")
    full.add("full", "stdlib_position_1024", list(-hard), 1.0)
    for window, worse in ((64, 0.10), (32, 0.105)):
        full.add(f"swa:window={window}", "stdlib_position_1024", list(-hard - worse), 0.1)
    better, worse = full.points()
    assert better.pattern == "swa:window=64"
    gap = difference(better, worse)
    # Their own intervals overlap, since items differ much; the difference does not hold zero.
    assert gap.low > 0 and worse.mean.high > better.mean.low
    assert gap.value == pytest.approx(better.mean.value - worse.mean.value)


def test_equal_scores_are_whole_in_every_draw(tmp_path: Path) -> None:
    # One right answer in five: a third of the draws leave full attention at chance.
    runs = Runs(tmp_path / "rare")
    for pattern, share in (("full", 1.0), ("swa:window=64", 0.12)):
        runs.add(pattern, "recall_passkey_1024", [1.0, 0.0, 0.0, 0.0, 0.0], share)
    (point,) = runs.points()
    assert (point.mean.low, point.mean.value, point.mean.high) == (1.0, 1.0, 1.0)


def test_benchmarks_join_the_length_they_share_most_patterns_with(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run_builder.TASKS, "recall_passkey_2048", ("acc,none", 0.0, 1.0, 2000))
    runs.add("full", "recall_passkey_2048", [1.0, 1.0], 1.0)
    for window, tasks in (
        (64, ("recall_passkey_1024", "arc_easy")),
        (32, ("recall_passkey_1024", "recall_passkey_2048", "arc_easy")),
        (16, ("recall_passkey_2048",)),
    ):
        for task in tasks:
            count = {"recall_passkey_1024": 5, "recall_passkey_2048": 2, "arc_easy": 4}[task]
            runs.add(f"swa:window={window}", task, [1.0] * count, 0.12)
    found = {(point.n, point.pattern): set(point.groups) for point in runs.points()}
    assert found == {
        (1024, "swa:window=64"): {RETRIEVAL, BENCHMARKS},
        (1024, "swa:window=32"): {RETRIEVAL, BENCHMARKS},
        (2048, "swa:window=32"): {RETRIEVAL},
        (2048, "swa:window=16"): {RETRIEVAL},
    }


def test_points_belong_to_the_smallest_budget_they_fit(runs: Runs) -> None:
    for window, share in ((1, 0.0626), (2, 0.13), (3, 0.2), (4, 0.3)):
        runs.add(f"swa:window={window}", "stdlib_position_1024", [-3.0] * 4, share)
    found = {point.pattern: point.budget for point in runs.points()}
    assert found == {
        "swa:window=1": 1 / 16,
        "swa:window=2": 1 / 4,
        "swa:window=3": 1 / 4,
        "swa:window=4": None,
    }


def test_a_task_that_full_attention_cannot_do_is_left_out(runs: Runs) -> None:
    runs.add("full", "hellaswag", [0.0, 0.0, 1.0, 0.0], 1.0)
    runs.add("swa:window=64", "hellaswag", [1.0, 1.0, 1.0, 0.0], 0.9)
    runs.add("swa:window=64", "recall_passkey_1024", [0.0, 1.0, 1.0, 0.0, 0.0], 0.12)
    (point,) = runs.points()
    assert set(point.tasks) == {"recall_passkey_1024"}


def test_layers_make_points_of_their_own(runs: Runs) -> None:
    runs.add("swa:window=64", "stdlib_position_1024", [-3.0] * 4, 0.12)
    runs.add("swa:window=32", "stdlib_position_1024", [-2.1] * 4, 0.12, layers=[1, 2])
    assert [point.layers for point in runs.points()] == ["[1, 2]", "all"]


def test_what_cannot_be_compared_is_refused(runs: Runs) -> None:
    runs.add("swa:window=64", "stdlib_position_1024", [-3.0] * 3, 0.12)
    with pytest.raises(UserError, match="different numbers of items"):
        runs.points()


def test_full_attention_is_needed(tmp_path: Path) -> None:
    alone = Runs(tmp_path / "alone")
    alone.add("swa:window=64", "stdlib_position_1024", [-3.0] * 3, 0.12)
    with pytest.raises(UserError, match="add 'full'"):
        alone.points()


def test_cells_without_items_are_refused(runs: Runs) -> None:
    runs.builder.add("swa:window=64", "recall_passkey_1024", 0.5)
    with pytest.raises(UserError, match="no scores of single items"):
        runs.points()


def test_a_folder_of_runs_stands_for_the_runs_in_it(runs: Runs) -> None:
    runs.add("swa:window=64", "recall_passkey_1024", [0.0, 1.0, 1.0, 0.0, 0.0], 0.12)
    folder = runs.builder.write()
    assert [run.path for run in load([folder.parent])] == [folder]
    assert [run.path for run in load([folder])] == [folder]


def test_report_holds_every_point_and_comparison(runs: Runs, tmp_path: Path) -> None:
    for window, correct in ((64, 3), (32, 1), (8, 2)):
        items = [1.0] * correct + [0.0] * (5 - correct)
        runs.add(f"swa:window={window}", "recall_passkey_1024", items, 0.12 if window > 8 else 0.05)
    loaded = load([runs.builder.write()])
    points = recover(loaded, BUDGETS)
    files = write_recovery(points, loaded, tmp_path / "out")
    content = json.loads(files.json.read_text())
    assert len(content["points"]) == 3
    (pair,) = content["against_the_best"]
    assert (pair["best"], pair["rival"]) == ("swa:window=64", "swa:window=32")
    assert pair["difference"]["value"] == pytest.approx(0.4 / 0.8)
    text = files.markdown.read_text()
    assert text.count("`swa:window=") == 3 and "n = 1,024" in text
    assert coloured(files.figure) > DRAWN and coloured(files.ranking) > DRAWN


def test_long_labels_stay_within_the_figure(runs: Runs) -> None:
    layers = {"0-3,5,7,9,11-15": "block_topk:block_size=4,topk=8,sinks=4,local=8"}
    runs.add("sinks:size=4+swa:window=64", "recall_passkey_1024", [1.0] * 5, 0.12, layers=layers)
    runs.add("sinks:size=4+swa:window=64+psa:window=99", "recall_passkey_1024", [1.0] * 5, 0.12)
    figure = draw(runs.points())
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.axes[0].bbox.y0


def test_a_composition_is_one_colour_whatever_its_numbers(runs: Runs) -> None:
    for pattern, share in (
        ("tail:size=8+block_topk:block_size=4,topk=2,sinks=4,local=4", 0.11),
        ("tail:size=16+block_topk:block_size=2,topk=3,sinks=4,local=4", 0.12),
        ("block_topk:block_size=4,topk=2,sinks=4,local=0,shared=8,segment=16", 0.12),
        ("block_topk:block_size=4,topk=2,branch=0,shared=8,threshold=0.1", 0.12),
        ("xattention:block_size=16,topk=2", 0.12),
        ("sinks:size=4+swa:window=64", 0.12),
    ):
        runs.add(pattern, "recall_passkey_1024", [1.0] * 5, share)
    runs.add("swa:window=64", "recall_passkey_1024", [1.0] * 5, 0.12, layers={"1": "full"})
    heads = {"2": "heads{1*full|1*swa:window=64}"}
    runs.add("swa:window=64", "recall_passkey_1024", [1.0] * 5, 0.12, layers=heads)
    points = runs.points()
    assert {composition(point) for point in points} == {
        "BlockTopK + tail",
        "shared BlockTopK",
        "shared thresholded BlockTopK",
        "XAttention",
        "sinks + SWA",
        "SWA; other in some layers",
        "SWA; by head in some layers",
    }
    (panel,) = (axes for axes in draw(points).axes if axes.get_visible())
    assert len(panel.get_legend_handles_labels()[1]) == 7


def test_a_ranking_has_a_row_for_each_pattern_and_tells_them_apart(runs: Runs) -> None:
    for pattern, correct in (
        ("sinks:size=4+swa:window=64", 4),
        ("sinks:size=4+swa:window=60", 3),
        ("xattention:block_size=16,topk=3", 2),
    ):
        items = [1.0] * correct + [0.0] * (5 - correct)
        runs.add(pattern, "recall_passkey_1024", items, 0.12)
    figure = draw_ranking([runs.points()])
    (panel,) = figure.axes
    assert panel.get_title(loc="left").startswith("n = 1,024, at most 1/8")
    rows = [label.get_text() for label in panel.get_yticklabels()]
    assert rows == ["sinks + SWA (window=64)", "sinks + SWA (window=60)", "XAttention"]
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert [float(np.asarray(dot.get_xdata())[0]) for dot in dots] == pytest.approx(
        [1.0, 0.75, 0.5]
    )
    colours = [dot.get_color() for dot in dots]
    assert colours[0] == colours[1] != colours[2]
    assert len(figure.legends) == 1
    ours = [point for point in runs.points() if "xattention" not in point.pattern]
    assert not draw_ranking([ours]).legends


def test_a_budget_of_everything_is_no_fraction(runs: Runs) -> None:
    runs.add("swa:window=64", "recall_passkey_1024", [1.0] * 5, 0.12)
    (panel,) = draw_ranking([runs.points(budgets=(1.0,))]).axes
    assert panel.get_title(loc="left").startswith("n = 1,024, any budget")


def test_the_command_writes_it(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.add("swa:window=64", "recall_passkey_1024", [0.0, 1.0, 1.0, 0.0, 0.0], 0.12)
    folder = runs.builder.write()
    assert main(["recovery", str(folder), "--budgets", "1/8"]) == 0
    assert "at most 0.125" in capsys.readouterr().out
    assert (folder / "recovery.png").exists() and (folder / "ranking.png").exists()


def test_budgets_of_keys_that_a_tile_reads(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    # The builder's tiles read (1 + share) / 2 of full attention's.
    for window, share in ((64, 0.12), (96, 0.3)):
        runs.add(f"swa:window={window}", "recall_passkey_1024", [1.0, 1.0, 1.0, 0.0, 0.0], share)
    folder = runs.builder.write()
    found = recover(load([folder]), (0.1, 0.6), by="visited")
    assert [(p.pattern, p.budget) for p in found] == [
        ("swa:window=64", 0.6),
        ("swa:window=96", None),
    ]
    assert main(["recovery", str(folder), "--budgets", "0.6", "--by", "visited"]) == 0
    assert "at most 0.6 of full attention's keys that a tile reads" in capsys.readouterr().out
    for file in runs.builder.files.values():
        del file["measured"]["visited_keys"]
    assert main(["recovery", str(runs.builder.write()), "--by", "visited"]) == 2
    assert "scripts/count_visited" in capsys.readouterr().err


def test_what_a_tile_reads_may_be_counted_later(runs: Runs) -> None:
    for share, layers in ((0.12, None), (0.2, {"1": "full"})):
        runs.add("swa:window=64", "recall_passkey_1024", [1.0] * 5, share, layers=layers)
    for file in runs.builder.files.values():
        if file["cell"].get("layers"):  # the other counted it, and is counted anew
            del file["measured"]["visited_keys"]
    folder = runs.builder.write()
    counts = {"visited_keys": {"16": 30.0}, "full_visited_keys": {"16": 100.0}}
    one = {"pattern": "swa:window=64", "layers": "null", "n": 1024, **counts}
    (folder / "visited.json").write_text(json.dumps({"counts": [{**one, "n": 64}, one]}))
    found = {point.layers: point.visited for point in recover(load([folder]), BUDGETS)}
    assert found == {"all": pytest.approx(0.3), '{"1": "full"}': None}
    (folder / "visited.json").write_text("[]")
    with pytest.raises(UserError, match="make it anew with scripts/count_visited"):
        load([folder])


def test_budgets_are_read_or_refused() -> None:
    assert parse_budgets("0.25,1/16") == [1 / 16, 0.25]
    for text in ("", "2", "1/0", "x", "0.1,,0.2"):
        with pytest.raises(UserError, match="budgets are shares"):
            parse_budgets(text)
