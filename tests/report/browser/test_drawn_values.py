"""What the page draws is what the cells' own files say, on every axis and in both views."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from sa_patch.report.pareto_figure import frontier
from tests.report.browser.conftest import TASKS
from tests.report.browser.report_page import ReportPage

LABELS = {"full": "Full attention", "sa": "SA", "swa": "SWA", "moba": "MoBA (topk=2)"}
AXES = ("window", "mean_keys", "flops", "seconds")
# Of a chart's range: the drawing has pixels, and places with two decimals.
CLOSE: Any = {"rel": 2e-3, "abs": 0.02}


def measured(run: Path, task: str) -> dict[tuple[str, int | None], dict[str, Any]]:
    """By method and window: the mean over seeds of every quantity, from the cells' files alone."""
    groups = defaultdict(list)
    for file in (run / "cells").iterdir():
        data = json.loads(file.read_text())
        if data["cell"]["task"] == task:
            groups[data["cell"]["method"], data["cell"]["window"]].append(data)
    scale = 1 if task == "stdlib_perplexity" else 100
    found = {}
    for place, cells in groups.items():

        def mean(read: Any, cells: list[dict[str, Any]] = cells) -> float:
            return statistics.fmean(read(cell) for cell in cells)

        values = [cell["primary"]["value"] for cell in cells]
        sampling = mean(lambda cell: cell["primary"]["stderr"] ** 2)
        seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
        found[place] = {
            "value": scale * statistics.fmean(values),
            "error": scale * (sampling + seeds) ** 0.5,
            "window": place[1],
            "mean_keys": mean(lambda cell: cell["measured"]["mean_keys_per_query"]),
            "flops": 100
            * mean(
                lambda cell: (
                    cell["measured"]["attention_flops"] / cell["measured"]["full_attention_flops"]
                )
            ),
            "visited": 100
            * mean(
                lambda cell: (
                    cell["measured"]["visited_keys"]["16"]
                    / cell["measured"]["full_visited_keys"]["16"]
                )
            ),
            "seconds": mean(
                lambda cell: cell["measured"]["model_seconds"] / cell["measured"]["sequences"]
            ),
            "hollow": place[0] != "full"
            and mean(lambda cell: cell["measured"]["saturated_fraction"]) >= 0.5,
        }
    return found


def expected_marks(points: dict[tuple[str, int | None], dict[str, Any]], axis: str) -> list[Any]:
    return sorted(
        [LABELS[method], point[axis], point["value"], point["hollow"]]
        for (method, _), point in points.items()
        if point[axis] is not None
    )


def assert_close(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for mark, wanted in zip(found, expected, strict=True):
        assert mark == [
            wanted[0],
            *(pytest.approx(value, **CLOSE) for value in wanted[1:3]),
            wanted[3],
        ]


@pytest.mark.parametrize("view", ["curves", "pareto"])
@pytest.mark.parametrize("axis", AXES)
def test_marks_stand_where_the_cells_say(
    first_page: ReportPage, runs: tuple[Path, Path], axis: str, view: str
) -> None:
    first_page.choose(axis)
    first_page.radio(view)
    # A window is no cost: the frontier is then drawn against keys.
    shown = "mean_keys" if (axis, view) == ("window", "pareto") else axis
    for task in TASKS:
        expected = expected_marks(measured(runs[0], task), shown)
        assert_close(sorted(first_page.drawn(task)["marks"]), expected)


def test_full_attention_is_a_line_across_the_chart(
    first_page: ReportPage, runs: tuple[Path, Path]
) -> None:
    for task in TASKS:
        full = measured(runs[0], task)["full", None]
        edges = first_page.chart(task).evaluate(
            """chart => {
              const { x, y } = chart.data.find((one) => one.kind === "across");
              const [low, high] = chart._fullLayout.xaxis.range.map((power) => 10 ** power);
              return [low, high, x[0], x.at(-1), Math.min(...y), Math.max(...y)];
            }"""
        )
        assert edges[2:4] == pytest.approx(edges[:2])
        assert edges[4:] == pytest.approx([full["value"]] * 2)


def test_bands_are_one_standard_error_wide(first_page: ReportPage, runs: tuple[Path, Path]) -> None:
    for task in TASKS:
        points = measured(runs[0], task)
        bands = first_page.drawn(task)["bands"]
        assert len(bands) == 4
        for method in ("sa", "swa", "moba"):
            rows = sorted(
                (point["window"], point["value"], point["error"])
                for (name, _), point in points.items()
                if name == method
            )
            corners = [(x, y + e) for x, y, e in rows] + [(x, y - e) for x, y, e in rows[::-1]]
            assert any(
                len(band) >= len(corners)
                and all(
                    corner == (pytest.approx(x, **CLOSE), pytest.approx(y, rel=5e-3, abs=0.05))
                    for (x, y), corner in zip(corners, map(tuple, band), strict=False)
                )
                for band in bands
            ), (task, method)


def test_without_bands_there_is_no_band_and_no_bar(first_page: ReportPage) -> None:
    first_page.radio("pareto")
    assert first_page.page.locator(".errorbar").count() > 0
    first_page.page.locator("#bands").uncheck()
    first_page.draw_all()
    assert first_page.page.locator(".errorbar").count() == 0
    first_page.radio("curves")
    assert first_page.drawn("boolq")["bands"] == []


@pytest.mark.parametrize("axis", ["mean_keys", "flops"])
def test_the_frontier_is_that_of_the_figures(
    first_page: ReportPage, runs: tuple[Path, Path], axis: str
) -> None:
    first_page.choose(axis)
    first_page.radio("pareto")
    for task in TASKS:
        places = [
            (point[axis], point["value"])
            for (method, _), point in measured(runs[0], task).items()
            if method != "full"
        ]
        best = frontier(places, higher_is_better=task != "stdlib_perplexity")
        first_page.draw_all()
        drawn = first_page.chart(task).evaluate(
            """chart => {
              const trace = chart.data.find(one => one.kind === "frontier");
              return trace.x.map((x, index) => [x, trace.y[index]]);
            }"""
        )
        assert [tuple(pair) for pair in drawn[:-1]] == [pytest.approx(pair) for pair in best]
        assert ["Pareto frontier", "hv"] in first_page.drawn(task)["lines"]
        assert drawn[-1][1] == drawn[-2][1]


def test_the_average_is_that_of_the_tasks(first_page: ReportPage, runs: tuple[Path, Path]) -> None:
    each = [measured(runs[0], task) for task in ("boolq", "mmlu")]
    expected = sorted(
        [
            LABELS[method],
            float(window),
            statistics.fmean(points[method, window]["value"] for points in each),
        ]
        for method, window in each[0]
        if window is not None
    )
    marks = sorted(mark[:3] for mark in first_page.drawn("average over 2 tasks")["marks"])
    assert len(marks) == len(expected)
    for mark, wanted in zip(marks, expected, strict=True):
        assert mark == [wanted[0], *(pytest.approx(value, **CLOSE) for value in wanted[1:])]
