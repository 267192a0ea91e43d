"""The report's files and terminal output."""

import csv
import io
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sa_patch.errors import UserError
from sa_patch.report.aggregate import compare
from sa_patch.report.build import markdown, print_report, read_report, write_report
from sa_patch.report.tables import csv_text
from sa_patch.sweep.results import load_run
from tests.sweep.run_builder import RunBuilder, plausible_run


@pytest.fixture
def run(tmp_path: Path) -> RunBuilder:
    builder = RunBuilder(tmp_path / "run")
    for task, full in (("hellaswag", 0.36), ("boolq", 0.50)):
        builder.add("full", task, full, stderr=0.03, saturated=1.0, share=1.0)
        for seed, change in ((0, -0.01), (1, 0.01)):
            value = full - 0.1 + change
            builder.add(f"sa:window=16,seed={seed}", task, value, stderr=0.04, share=0.2)
        builder.add("swa:window=16", task, full - 0.2, stderr=0.05, saturated=0.6)
    return builder


def printed(run_dirs: list[Path], width: int = 200) -> str:
    """What the terminal shows; the figures, which take a second, are not drawn."""
    buffer = io.StringIO()
    print_report(read_report(run_dirs), Console(file=buffer, width=width))
    return buffer.getvalue()


def written(run_dir: Path) -> str:
    """The Markdown, without figures."""
    return markdown(read_report([run_dir]), [])


def test_files_are_written_into_the_run_folder(run: RunBuilder) -> None:
    written = write_report([run.write()], None, "window")
    assert written.markdown == run.path / "results.md"
    assert written.csv == run.path / "results.csv"
    assert written.csv.read_bytes().decode() == csv_text(written.report.comparison)
    assert [path.name for path in written.figures] == [
        "average_vs_window.png",
        "average_vs_window.svg",
        "tasks_vs_window.png",
        "tasks_vs_window.svg",
        "pareto.png",
        "pareto.svg",
    ]
    assert written.page.read_text().startswith("<!doctype html>")
    assert written.figure.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in written.figures[1].read_text()
    assert sorted(path.name for path in run.path.iterdir()) == sorted(
        ["manifest.json", "cells", "report.html", "results.md", "results.csv"]
        + [path.name for path in written.figures]
    )


def test_csv_holds_every_point_in_raw_units(run: RunBuilder) -> None:
    text = csv_text(read_report([run.write()]).comparison)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 9  # 3 points, each on 2 tasks and on average
    by_key = {(row["kind"], row["series"], row["task"]): row for row in rows}
    sa = by_key["task", "SA", "hellaswag"]
    assert (sa["pattern"], sa["window"], sa["seeds"], sa["samples"]) == (
        "sa:window=16",
        "16",
        "0 1",
        "50",
    )
    assert float(sa["value"]) == pytest.approx(0.26)
    assert float(sa["seed_error"]) == pytest.approx(0.01)  # 0.02 / sqrt(2) / sqrt(2)
    assert float(sa["error"]) == pytest.approx(math.hypot(0.01, 0.04))
    assert float(sa["flops_share_of_full"]) == pytest.approx(0.2)
    assert float(sa["full_attention_flops_per_sequence"]) == pytest.approx(1e6 * 105**2)
    average = by_key["average", "SWA", "hellaswag;boolq"]
    assert float(average["value"]) == pytest.approx((0.16 + 0.30) / 2)
    assert float(average["error"]) == pytest.approx(0.05 / math.sqrt(2))
    assert (average["saturated"], average["seeds"]) == ("true", "")
    assert by_key["task", "Full attention", "boolq"]["saturated"] == "false"
    assert by_key["task", "Full attention", "boolq"]["window"] == ""


def test_markdown_shows_scores_provenance_and_how_to_read_them(run: RunBuilder) -> None:
    text = write_report([run.write()]).markdown.read_text()
    assert "| method | window | average % | hellaswag acc_norm % | boolq acc % |" in text
    assert "| Full attention |  | 43.0 ±2.1 | 36.0 ±3.0 | 50.0 ±3.0 |" in text
    assert "| SA | 16 | 33.0 ±3.0 | 26.0 ±4.1 | 40.0 ±4.1 |" in text
    assert "| SWA | 16 | 23.0 ±3.5° | 16.0 ±5.0° | 30.0 ±5.0° |" in text
    assert "![average vs window](average_vs_window.png)" in text
    for line in (
        "**Figures on a subset: the first 50 items of each task",
        "- model: smollm2-135m",
        "- dtype: float32",
        "- items per task: hellaswag 50, boolq 50",
        "- versions: python 3.12.1, torch 2.13.0, lm_eval 0.4.13",
        "- commit: 0123456789abcdef with local changes",
        "- hardware: cpu Test CPU, cores 2, memory_gib 7.6",
        "unweighted mean of the primary accuracies of hellaswag, boolq",
        "from seeds (SA: 2 seeds)",
    ):
        assert line in text
    assert "Incomplete" not in text and "not used" not in text


def test_provenance_is_that_of_the_sessions_that_computed_something(run: RunBuilder) -> None:
    def session(torch: str, cpu: str, **more: Any) -> dict[str, Any]:
        return {
            "command": ["sa-patch", cpu],
            "versions": {"torch": torch},
            "git": {"commit": cpu},
            "hardware": {"cpu": cpu},
            **more,
        }

    sessions = [session("1", "one", ran=2), session("2", "two"), session("3", "three", ran=0)]
    text = write_report([run.write(**sessions[-1], sessions=sessions)]).markdown.read_text()
    for line in ("versions: torch 2", "commit: one, two", "hardware: cpu one; cpu two"):
        assert f"- {line}\n" in text
    assert "- command: sa-patch two\n" in text


def test_no_limit_is_no_subset(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run", limit=None)
    builder.add("full", "hellaswag", 0.36)
    text = written(builder.write())
    assert "subset" not in text and "every task whole, no limit" in text


def test_limits_by_task_are_told(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "hellaswag", 0.36)
    builder.add("full", "mmlu", 0.3, limit=2)
    text = written(builder.write())
    assert "subset: the first 2 items of mmlu; the first 50 items of hellaswag" in text


def test_incomplete_run_says_what_is_missing_everywhere(run: RunBuilder) -> None:
    failed = run.add("swa:window=32", "hellaswag", 0.3, status="failed")
    run.add("swa:window=64", "hellaswag", 0.3, written=False)
    run_dir = run.write()
    text = printed([run_dir])
    note = "Incomplete: 2 of 10 planned cells are missing (1 of them failed)."
    assert note in text
    assert f"not used: {failed}.json: failed: RuntimeError: out of memory" in text
    assert note in written(run_dir) and failed in written(run_dir)


def test_terminal_table_has_every_point_whatever_the_width(run: RunBuilder) -> None:
    run_dir = run.write()
    for width in (200, 60):
        text = printed([run_dir], width)
        assert all(len(line) <= width for line in text.splitlines())
        for figure in ("43.0 ±2.1", "26.0 ±4.1", "30.0 ±5.0°"):
            assert figure in text
    row = next(line for line in printed([run_dir]).splitlines() if line.startswith("SA "))
    assert re.split(r"\s*│\s*", row.strip())[:5] == [
        "SA",
        "16",
        "33.0 ±3.0",
        "26.0 ±4.1",
        "40.0 ±4.1",
    ]


def test_perplexities_stay_out_of_the_average_and_out_of_percent(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    for task, value in (("hellaswag", 0.36), ("boolq", 0.5), ("stdlib_perplexity", 12345.6)):
        builder.add("full", task, value, stderr=value / 10)
    text = written(builder.write())
    assert "| Full attention |  | 43.0 ±3.1 | 36.0 ±3.6 | 50.0 ±5.0 | 12,346 ±1,235 |" in text
    assert "stdlib_perplexity word_perplexity ↓" in text
    assert "Left out of it: stdlib_perplexity (not an accuracy)" in text


def test_several_runs_need_an_out_folder_and_share_one_table(tmp_path: Path) -> None:
    runs = [
        plausible_run(
            tmp_path / name, ["hellaswag"], (16, 64), model_name=name, model=f"sha256:{name}"
        )
        for name in ("small", "large")
    ]
    with pytest.raises(UserError, match="--out"):
        write_report(runs)
    buffer = io.StringIO()
    write_report(runs, tmp_path / "both", "window", Console(file=buffer, width=200))
    text = buffer.getvalue()
    assert "Results: large and small" in text
    assert "SA, small" in text and "SA, large" in text
    assert (tmp_path / "both" / "results.csv").is_file()
    assert not (runs[0] / "results.csv").exists()


def test_requests_that_cannot_be_served(run: RunBuilder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder given"):
        write_report([])
    run_dir = run.write()
    with pytest.raises(UserError, match="unknown x axis"):
        write_report([run_dir], None, "keys")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report into .*--out"):
        write_report([run_dir], tmp_path / "file")


def test_the_same_run_gives_the_same_bytes(run: RunBuilder, tmp_path: Path) -> None:
    run_dir = run.write()
    first = write_report([run_dir], tmp_path / "first", "flops")
    second = write_report([run_dir], tmp_path / "second", "flops")
    for one, two in zip(
        (first.csv, first.markdown, *first.figures),
        (second.csv, second.markdown, *second.figures),
        strict=True,
    ):
        assert one.read_bytes() == two.read_bytes()


def test_importing_the_report_does_not_import_torch() -> None:
    code = "import sys, sa_patch.report.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("share", "saturated"), [(0.49, False), (0.5, True)])
def test_a_point_is_saturated_from_half_of_its_sequences_on(
    tmp_path: Path, share: float, saturated: bool
) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.add("full", "boolq", 0.6, saturated=1.0)
    builder.add("swa:window=16", "boolq", 0.5, saturated=share)
    points = compare(load_run(builder.write()).cells).points
    assert [point.saturated for point in points if not point.series.is_full] == [saturated]
