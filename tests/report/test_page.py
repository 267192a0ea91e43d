"""The report page's content: what it holds, how a point is computed again, and what it weighs."""

import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sa_patch.cli.command import main
from sa_patch.figures.colours import COLOURS, FULL_COLOUR, OTHER_COLOURS
from sa_patch.report.build import Report, read_report, report_page
from sa_patch.report.page.colours import BACKGROUNDS, contrast, legible
from sa_patch.sweep.config import parse_config
from sa_patch.sweep.plan import make_plan
from sa_patch.sweep.run import run_sweep
from tests.sweep.run_builder import RunBuilder, paper_grid, plausible_run

NAMES = ("Full attention", "SA", "SWA", "MoBA (topk=2)")


def content(page: str) -> dict[str, Any]:
    """The JSON within the page."""
    start = page.index('id="data">') + len('id="data">')
    data: dict[str, Any] = json.loads(page[start : page.index("</script>", start)])
    return data


def shown(folders: Sequence[Path]) -> tuple[Report, dict[str, Any]]:
    report = read_report(folders)
    return report, content(report_page(report))


def split_command(command: str) -> tuple[list[str], str]:
    """The words of a command's first line, and what it gets on standard input."""
    first, _, rest = command.partition("\n")
    assert first.endswith(" <<'EOF'") and rest.endswith("EOF")
    return shlex.split(first.removesuffix(" <<'EOF'")), rest.removesuffix("EOF")


def test_every_point_is_there_in_raw_units(tmp_path: Path) -> None:
    report, data = shown([plausible_run(tmp_path / "run", ["boolq", "mmlu", "stdlib_perplexity"])])
    (view,) = data["views"]
    points = [*report.comparison.averages, *report.comparison.points]
    assert len(view["points"]) == len(points) > 60
    for point, there in zip(points, view["points"], strict=True):
        assert data["series"][there["series"]]["label"] == point.series.label
        assert (there["task"], there["window"], there["pattern"]) == (
            *(point.task, point.window, point.pattern),
        )
        same = ("value", "error", "mean_keys", "last_query_keys", "flops", "flops_share", "chance")
        for name in (*same, "saturated", "saturated_fraction", "seconds", "samples"):
            assert there[name] == getattr(point, name)
    assert view["averaged"] == ["boolq", "mmlu"]
    assert data["tasks"] == ["boolq", "mmlu", "stdlib_perplexity"]


def test_time_in_the_model_is_given_per_sequence(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    identifier = builder.add("swa:window=16", "boolq", 0.5)
    builder.files[identifier]["measured"]["model_seconds"] = 30.0
    _, data = shown([builder.write()])
    assert data["views"][0]["points"][-1]["seconds"] == pytest.approx(30.0 / 200)


def test_several_runs_are_shown_together_and_each_by_itself(tmp_path: Path) -> None:
    first = plausible_run(tmp_path / "a" / "run", ["boolq"], windows=(16,), dtype="float32")
    second = plausible_run(tmp_path / "b" / "run", ["boolq"], windows=(16, 32), dtype="bfloat16")
    report, data = shown([first, second])
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    together, *each = data["views"]
    assert [view["name"] for view in each] == ["a/run", "b/run"]
    assert len(together["points"]) == sum(len(view["points"]) for view in each)
    for view, dtype in zip(each, ("float32", "bfloat16"), strict=True):
        labels = {data["series"][point["series"]]["label"] for point in view["points"]}
        assert labels == {f"{name}, {dtype}" for name in NAMES}
    assert len(data["series"]) == len(report.comparison.series) == 8


def test_a_text_cannot_leave_the_element_it_stands_in(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    run = plausible_run(tmp_path / "run", ["boolq"], windows=(16,), model_name=evil)
    page = report_page(read_report([run]))
    assert content(page)["title"] == evil
    assert "alert(1)</script>" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in page  # the title


def test_a_command_sweeps_exactly_the_cells_of_its_point(checkpoint: Path, tmp_path: Path) -> None:
    """By their ids, which stand for all that determines a result; for every kind of setting."""
    config = parse_config(
        {
            "model": {"pretrained": str(checkpoint), "dtype": "float32"},
            "windows": [8, 16],
            "methods": [
                "full",
                {"method": "sa", "seeds": [0, 1]},
                {"method": "moba", "topk": 2},
                {"method": "sinks:4+swa:12", "layers": {"0": "full"}},
                {"method": "swa:8", "layers": "0"},
            ],
            "tasks": [
                {"task": "needle_128", "limit": 2},
                {"task": "lambada_openai", "num_fewshot": 1},
                {"task": "humaneval", "gen_kwargs": {"max_gen_toks": 8}},
            ],
            "decode": "pattern",
            "backend": "reference",
            "batch_size": 3,
        }
    )
    plan = make_plan(config, run_code=True)
    builder = RunBuilder(tmp_path / "run")
    for cell in plan.cells:
        builder.files[cell.id] = finished(cell.id, dict(cell.cell))
    options = ["--benchmarks=some where", "--confirm-run-unsafe-code"]
    command = ["sa-patch", "sweep", "my.yaml", "--out", "x", *options]
    report, data = shown([builder.write(config=config.to_dict(), command=command)])
    points = [*report.comparison.averages, *report.comparison.points]
    # Full, two windows of SA, two of MoBA, and two with layers; on three tasks and their average.
    assert len(points) == 4 * 7
    for point, there in zip(points, data["views"][0]["points"], strict=True):
        words, text = split_command(data["commands"][there["command"]])
        assert words[:3] == ["sa-patch", "sweep", "-"]
        assert words[5:] == ["--benchmarks", "some where", "--confirm-run-unsafe-code"]
        again = parse_config(yaml.safe_load(text))
        assert again.batch_size == 3
        cells = make_plan(again, run_code=True).cells
        assert {cell.id for cell in cells} == {cell.id for cell in point.cells}
        assert {cell.model for cell in cells} == set(config.models)


def finished(identifier: str, cell: dict[str, Any]) -> dict[str, Any]:
    value = 0.25 + int(identifier, 16) % 1000 / 2000
    return {
        "schema": 1,
        "id": identifier,
        "cell": cell,
        "status": "done",
        "scores": {"acc,none": value},
        "primary": {"metric": "acc,none", "value": value, "higher_is_better": True},
        "samples": 10,
        "measured": {},
    }


def test_the_command_gives_the_same_scores(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(
        {
            "model": {"pretrained": str(checkpoint), "dtype": "float32"},
            "windows": [16],
            "methods": [{"method": "sa", "seeds": [0, 1]}],
            "tasks": ["needle_128"],
            "limit": 2,
            "batch_size": 2,
        }
    )
    out = tmp_path / "run"
    assert run_sweep(config, make_plan(config), out, command=["sa-patch", "sweep"]).ran == 2
    _, data = shown([out])
    (point,) = data["views"][0]["points"][1:]
    words, text = split_command(data["commands"][point["command"]])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(words[1:]) == 0
    (again,) = (tmp_path / "runs").iterdir()
    assert str(again.relative_to(tmp_path)) == words[words.index("--out") + 1]
    for file in (out / "cells").iterdir():
        then, now = (json.loads((run / "cells" / file.name).read_text()) for run in (out, again))
        assert (then["scores"], then["items"]) == (now["scores"], now["items"])
    assert data["views"][0]["points"][1]["seconds"] > 0


def test_what_standard_input_gets_wrong_is_said_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, expected in (("{", "standard input is not a readable YAML file"), ("a: 1", "'a'")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(["sweep", "-"]) == 2
        message = capsys.readouterr().err
        assert expected in message and "standard input" in message and "Traceback" not in message


@pytest.mark.parametrize("colour", [*COLOURS.values(), *OTHER_COLOURS, FULL_COLOUR])
@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_page(colour: str, dark: bool) -> None:
    found = legible(colour, dark=dark)
    assert contrast(found, BACKGROUNDS[dark]) >= 3
    if contrast(colour, BACKGROUNDS[dark]) >= 3:
        assert found.lower() == colour.lower()


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # A grey that is widely given as just short of 4.5 on white, and the next one as above it.
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.005)


def test_colours_of_the_page_are_those_of_its_style(tmp_path: Path) -> None:
    page = report_page(read_report([plausible_run(tmp_path / "run", ["boolq"], windows=(16,))]))
    style = page[page.index("<style>") : page.index("</style>")]
    for background in BACKGROUNDS.values():
        assert f"--ground: {background};" in style


def test_the_papers_whole_grid_weighs_less_than_6_megabytes(tmp_path: Path) -> None:
    page = report_page(read_report(paper_grid(tmp_path)))
    assert len(content(page)["views"][0]["points"]) == 2 * 8 * 43
    assert len(page.encode()) < 6_000_000
