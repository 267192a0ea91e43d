"""What a report says of lengths: averages, how far they are kept, and the pictures of both."""

from pathlib import Path

import numpy as np
import pytest

from sa_patch.report.build import draw_figures, markdown, read_report, report_page
from sa_patch.report.lengths.by_length import by_length, kept_up_to
from sa_patch.report.lengths.tables import length_tables
from tests.sweep import run_builder
from tests.sweep.run_builder import RunBuilder

FULL, LOCAL = "full", "sinks:size=4+swa:window=60"
# pattern -> task -> scores at 1,024, 2,048 and 4,096 tokens; None: not run
SCORES: dict[str, dict[str, tuple[float | None, ...]]] = {
    FULL: {"niah_single_1": (1.0, 1.0, 0.8), "ruler_vt": (0.8, 0.6, 0.4)},
    LOCAL: {"niah_single_1": (1.0, 0.5, 0.8), "ruler_vt": (0.6, 0.3, None)},
}
LENGTHS = (1024, 2048, 4096)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    builder = RunBuilder(tmp_path / "run")
    for pattern, tasks in SCORES.items():
        method = "full" if pattern == FULL else "union"
        for task, scores in tasks.items():
            for length, score in zip(LENGTHS, scores, strict=True):
                monkeypatch.setitem(
                    run_builder.TASKS, task, ("string_match,none", 0.0, 0.9, length)
                )
                depths = {"acc_depth_5,none": score, "acc_depth_95,none": 0.0} if score else {}
                if score is not None:
                    builder.add(
                        pattern,
                        task,
                        score,
                        scores=depths if task.startswith("niah") else {},
                        share=1.0 if pattern == FULL else 0.25,
                        metadata={"max_seq_lengths": [length]},
                        method=method,
                        window=None if pattern == FULL else 64,
                    )
    builder.add(FULL, "needle", 0.9)
    # At one length alone: no line, no panel, and no reason to leave the others' tasks out.
    builder.add("swa:window=9", "ruler_vt", 0.1, metadata={"max_seq_lengths": [4096]})
    builder.write()
    return builder.path


def test_averages_are_over_what_every_pattern_has_at_a_length(run: Path) -> None:
    found = by_length(read_report([run]).comparison)
    assert found is not None
    assert (found.tasks, found.lengths) == (("niah_single_1", "ruler_vt"), LENGTHS)
    full, local = found.rows
    assert found.full_of(local) == full
    assert found.averages(full) == pytest.approx({1024: 0.9, 2048: 0.8, 4096: 0.8})
    assert found.averages(local) == pytest.approx({1024: 0.8, 2048: 0.4, 4096: 0.8})
    assert set(found.shares(local).values()) == {0.25}
    first, needles, tracking = length_tables(found)
    assert first.title == "Average of 2 tasks at 1,024, 2 tasks at 2,048, 1 task at 4,096"
    # 0.8 of 0.9 is kept, 0.4 of 0.8 is not: what comes after a loss does not count.
    assert first.rows[1][1:] == ("80.0", "40.0", "80.0", "66.7", "1,024", "25")
    assert first.rows[0][1:] == ("90.0", "80.0", "80.0", "83.3", "4,096", "100")
    assert needles.rows[1][1:5] == ("100.0", "50.0", "80.0", "76.7")
    # 0.6 is 75% of 0.8; a mean over other lengths than the rest have would flatter.
    assert tracking.rows[1][1:6] == ("60.0", "30.0", "–", "–", "none")


def test_nothing_is_kept_of_nothing() -> None:
    assert kept_up_to({1024: 0.0, 2048: 0.0}, {1024: 0.0, 2048: 0.0}) is None
    assert kept_up_to({1024: 0.85}, {1024: 1.0, 2048: 1.0}) == 1024


def test_the_heatmap_has_a_panel_per_pattern_and_a_score_in_each_place(run: Path) -> None:
    figures = draw_figures(read_report([run]), "window")
    full, local = figures["needles"].axes
    assert [label.get_text() for label in local.get_xticklabels()] == ["1,024", "2,048", "4,096"]
    assert full.get_ylabel() == "niah_single_1\ndepth, % of the text"
    shown = np.asarray(local.images[0].get_array())
    assert shown.tolist() == [[1.0, 0.5, 0.8], [0.0, 0.0, 0.0]]
    average, cost, *tasks = figures["lengths"].axes
    assert [axes.get_title(loc="left") for axes in tasks] == ["niah_single_1", "ruler_vt"]
    assert np.allclose(average.lines[1].get_ydata(), [80, 40, 80])
    assert np.allclose(cost.lines[1].get_ydata(), 25.0)


def test_the_page_and_the_tables_hold_them(run: Path) -> None:
    report = read_report([run])
    figures = draw_figures(report, "window")
    page = report_page(report, figures)
    assert '<h2 id="lengths">By length</h2>' in page
    assert page.count('<img class="picture" src="data:image/png;base64,') == 2
    assert "kept up to (≥ 85% of full)" in page
    text = markdown(report, [])
    assert "### By length: niah_single_1" in text
    assert 'id="lengths"' not in report_page(read_report([run_without_lengths(run)]))


def run_without_lengths(run: Path) -> Path:
    builder = RunBuilder(run.parent / "other")
    builder.add(FULL, "needle", 0.9)
    builder.write()
    return builder.path
