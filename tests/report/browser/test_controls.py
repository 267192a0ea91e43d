"""Every control of the page is used, and changes what it says it changes."""

from pathlib import Path

import pytest

from tests.report.browser.conftest import Open
from tests.report.browser.report_page import ReportPage
from tests.thorough import unless_thorough

METHODS = ["Full attention", "SA", "SWA", "MoBA (topk=2)"]
TITLES = ["average over 2 tasks", "boolq", "mmlu", "stdlib_perplexity"]
POINTS = 10  # full attention and three methods at three windows, on each task


def legend(page: ReportPage) -> list[str]:
    return [text.strip() for text in page.page.locator("#legend li").all_inner_texts()]


def test_everything_is_shown_at_first(first_page: ReportPage) -> None:
    page = first_page
    assert page.titles() == TITLES
    assert page.page.title() == "Results: model-a"
    assert page.page.locator("h1").inner_text() == "Results: model-a"
    assert legend(page)[:-1] == METHODS and legend(page)[-1].startswith("hollow")
    assert len(page.table()) == POINTS * len(TITLES)
    assert "the first 50 items" in page.page.locator("#warnings").inner_text()


def test_tasks_are_chosen_in_charts_and_table(first_page: ReportPage) -> None:
    page = first_page
    page.box("tasks", "boolq").uncheck()
    assert page.titles() == [title for title in TITLES if title != "boolq"]
    assert "boolq" not in {row["task"] for row in page.table()}
    page.box("tasks", "boolq").check()
    assert page.titles() == TITLES
    page.page.locator("#tasks button", has_text="none").click()
    assert page.titles() == [] and page.table() == []
    assert page.page.locator("#empty").is_visible()
    page.page.locator("#tasks button", has_text="all").click()
    assert page.titles() == TITLES
    assert page.page.locator("#empty").is_hidden()


def test_methods_are_chosen_in_charts_legend_and_table(first_page: ReportPage) -> None:
    page = first_page
    page.box("series", "SWA").uncheck()
    assert page.names("boolq") == {"SA", "MoBA (topk=2)"}
    assert legend(page)[:3] == ["Full attention", "SA", "MoBA (topk=2)"]
    assert len(page.table()) == (POINTS - 3) * len(TITLES)
    page.page.locator("#series button", has_text="none").click()
    page.box("series", "SWA").check()
    assert page.names("boolq") == {"SWA"}
    page.page.locator("#series button", has_text="all").click()
    assert page.names("boolq") == {"SA", "SWA", "MoBA (topk=2)"}


def test_axes_are_chosen(first_page: ReportPage) -> None:
    page = first_page
    names = page.page.locator("#axis option").all_inner_texts()
    assert names == [
        "window (keys per query allowed)",
        "keys per query, measured mean",
        "attention FLOPs, % of full attention",
        "keys that a tile reads, % of full attention",
        "seconds per sequence, measured",
    ]
    values = ("window", "mean_keys", "flops", "visited", "seconds")
    for value, name in zip(values, names, strict=True):
        page.choose(value)
        page.draw_all()
        assert page.chart("boolq").locator(".xtitle").text_content() == name


def test_reset_shows_everything_again(first_page: ReportPage) -> None:
    page = first_page
    page.choose("flops")
    page.radio("pareto")
    page.page.locator("#bands").uncheck()
    page.box("tasks", "mmlu").uncheck()
    page.box("series", "SA").uncheck()
    page.page.locator("#reset").click()
    assert page.titles() == TITLES
    assert page.names("boolq") == {"SA", "SWA", "MoBA (topk=2)"}
    assert page.page.locator("#axis").input_value() == "window"
    assert page.page.locator("#bands").is_checked()
    assert page.page.locator("input[value=curves]").is_checked()


def test_models_side_by_side(open_page: Open, both: Path) -> None:
    page = open_page(both)
    together = {f"{name}, {model}" for name in METHODS[1:] for model in ("model-a", "model-b")}
    assert page.names("boolq") == together
    page.radio("models")
    page.draw_all()
    assert page.titles()[2:4] == ["boolq · model-a", "boolq · model-b"]
    for model in ("model-a", "model-b"):
        assert page.names(f"boolq · {model}") == {f"{name}, {model}" for name in METHODS[1:]}
    # Both stand on one scale.
    ranges = [
        page.chart(f"boolq · {model}").evaluate("chart => chart._fullLayout.yaxis.range")
        for model in ("model-a", "model-b")
    ]
    assert ranges[0] == ranges[1]
    tops = [page.chart(f"boolq · {model}").bounding_box() for model in ("model-a", "model-b")]
    assert tops[0] and tops[1] and tops[0]["y"] == tops[1]["y"] and tops[0]["x"] < tops[1]["x"]
    page.box("models", "model-b").uncheck()
    assert page.titles()[1] == "boolq · model-a"
    assert {row["model"] for row in page.table()} == {"model-a"}


def test_runs_side_by_side(open_page: Open, both: Path) -> None:
    page = open_page(both)
    assert page.page.locator("#runs").is_hidden()
    page.radio("runs")
    assert page.page.locator("#runs").is_visible()
    assert {row["run"] for row in page.table()} == {"first", "second"}
    windows = {mark[1] for mark in page.drawn("boolq · second")["marks"]}
    assert len(windows) == 4
    assert len({mark[1] for mark in page.drawn("boolq · first")["marks"]}) == 3
    panel = page.page.locator(".panel").nth(page.titles().index("stdlib_perplexity · second"))
    assert "No result here" in panel.inner_text()
    page.box("runs", "second").uncheck()
    assert all(title.endswith("first") for title in page.titles())


def test_what_cannot_be_chosen_is_not_offered(open_page: Open, one: Path, both: Path) -> None:
    single = open_page(one)
    for name in ("#columns", "#models", "#runs"):
        assert single.page.locator(name).is_hidden()
    assert open_page(both).page.locator("#columns").is_visible()


def test_a_view_can_be_sent_as_an_address(open_page: Open, both: Path) -> None:
    page = open_page(both)
    page.choose("flops")
    page.radio("pareto")
    page.radio("models")
    page.page.locator("#bands").uncheck()
    page.box("tasks", "mmlu").uncheck()
    page.box("models", "model-b").uncheck()
    address = page.page.url.partition("#")[2]
    again = open_page(both, address=f"#{address}")
    assert again.titles() == page.titles()
    assert again.page.locator("#axis").input_value() == "flops"
    assert not again.page.locator("#bands").is_checked()
    assert again.table() == page.table()
    # Going back in the browser's history, or editing the address, counts too.
    again.page.evaluate("location.hash = 'x=mean_keys'")
    again.page.wait_for_timeout(200)
    assert again.page.locator("#axis").input_value() == "mean_keys"
    assert len(again.titles()) > len(page.titles())


ADDRESSES = ["#x=colour&view=pie&tasks=99.x&columns=rows", "#%%%", "#=&&"]


@pytest.mark.parametrize("address", unless_thorough(ADDRESSES[:2], ADDRESSES))
def test_an_address_that_means_nothing_does_no_harm(
    open_page: Open, one: Path, address: str
) -> None:
    page = open_page(one, address=address)
    assert page.page.locator("#axis").input_value() == "window"
    assert page.titles() == ([] if "tasks" in address else TITLES)


def test_provenance_and_notes_are_in_plain_sight(open_page: Open, both: Path) -> None:
    page = open_page(both)
    text = page.page.locator("#provenance").inner_text()
    for part in (
        *("first", "second", "Test CPU", "python 3.12.1", "0123456789abcdef with local changes"),
        *("sa-patch sweep test.yaml", "float32", "2026-11-22T18:00:00Z"),
    ):
        assert part in text
    notes = page.page.locator("#notes").inner_text()
    assert "one standard error" in notes and "saturated" in notes
    assert "sideways" not in notes  # that is done in the pictures only
