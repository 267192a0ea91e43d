"""A single point: pointed at, clicked, reached by keyboard, in the table, and computed again."""

import re
from pathlib import Path

from sa_patch.report.build import read_report
from tests.report.browser.conftest import Open
from tests.report.browser.report_page import ReportPage


def mark_of(page: ReportPage, title: str, name: str, index: int) -> tuple[float, float]:
    """The place on the screen of a series' mark."""
    chart = page.chart(title)
    chart.scroll_into_view_if_needed()
    place: list[float] = chart.evaluate(
        """(chart, [name, index]) => {
          const trace = chart._fullData.find((one) => one.name === name && one.kind !== "across"
            && one.mode.includes("markers"));
          const marks = chart.querySelectorAll(`.trace${trace.uid} path.point`);
          const { x, y, width, height } = marks[index].getBoundingClientRect();
          return [x + width / 2, y + height / 2];
        }""",
        [name, index],
    )
    return place[0], place[1]


def test_pointing_at_a_saturated_mark_explains_it(first_page: ReportPage) -> None:
    page = first_page
    # Where all are full attention their marks lie on each other.
    for method in ("SWA", "MoBA (topk=2)"):
        page.box("series", method).uncheck()
    page.draw_all()
    for index, explained in ((0, False), (2, True)):
        page.page.mouse.move(0, 0)
        page.page.mouse.move(*mark_of(page, "boolq", "SA", index))
        page.page.wait_for_selector(".hovertext")
        text = page.page.locator(".hovertext").text_content() or ""
        assert "SA, window" in text and "keys per query" in text
        assert ("saturated: full attention in 100% of the sequences" in text) == explained


def test_a_click_tells_all_of_a_point(first_page: ReportPage, runs: tuple[Path, Path]) -> None:
    page = first_page
    dialog = page.page.locator("#details")
    assert dialog.is_hidden()
    page.page.mouse.click(*mark_of(page, "boolq", "SA", 0))
    assert dialog.is_visible()
    comparison = read_report([runs[0]]).comparison
    (point,) = [
        point
        for point in comparison.of_task("boolq")
        if (point.series.label, point.window) == ("SA", 16)
    ]
    assert page.page.locator("#details-title").inner_text() == "boolq: SA, window 16"
    text = dialog.inner_text()
    assert point.error is not None and point.flops_share is not None
    assert f"{100 * point.value:.1f} ± {100 * point.error:.1f} %" in text
    assert f"{100 * point.flops_share:.1f}" in text and "0, 1, 2" in text
    assert "methods:\n- sa:window=16,seed=0\n- sa:window=16,seed=1" in text
    page.page.locator("#details-close").click()
    assert dialog.is_hidden()
    page.page.mouse.click(*mark_of(page, "boolq", "SA", 2))
    assert "says little about sparsity" in dialog.inner_text()
    page.page.keyboard.press("Escape")
    assert dialog.is_hidden()


def test_full_attention_can_be_clicked_anywhere_on_its_line(first_page: ReportPage) -> None:
    page = first_page
    page.page.locator("#series button", has_text="none").click()
    page.box("series", "Full attention").check()
    page.draw_all()
    chart = page.chart("boolq")
    chart.scroll_into_view_if_needed()
    x, y = chart.evaluate(
        """chart => {
          const { x, y, width } = chart.querySelector(".nsewdrag").getBoundingClientRect();
          const line = chart.data.find((trace) => trace.kind === "across");
          return [x + width / 3, y + chart._fullLayout.yaxis.d2p(line.y[0])];
        }"""
    )
    page.page.mouse.move(x - 3, y)
    page.page.mouse.click(x, y)
    assert page.page.locator("#details-title").inner_text() == "boolq: Full attention"


def test_commands_are_copied(first_page: ReportPage) -> None:
    page = first_page
    page.page.mouse.click(*mark_of(page, "mmlu", "SWA", 1))
    page.page.locator("#details-copy").click()
    page.page.wait_for_selector("text=Copied")
    copied = page.page.evaluate("navigator.clipboard.readText()")
    assert copied == page.page.locator("#details-command").inner_text()
    assert copied.startswith("sa-patch sweep - --out runs/point-")
    assert "- swa:window=64\n" in copied and "task: mmlu" in copied
    row = page.page.locator("#table tbody tr").filter(has_text="moba:block_size=8,topk=2").first
    row.locator("button").click()
    page.page.wait_for_selector("td >> text=Copied")
    assert "- moba:block_size=8,topk=2\n" in page.page.evaluate("navigator.clipboard.readText()")
    assert page.page.locator("#live").inner_text() == "The command was copied."


def test_charts_are_walked_by_keyboard(open_page: Open, one: Path) -> None:
    page = open_page(one)
    chart = page.chart("boolq")
    chart.focus()
    page.page.keyboard.press("ArrowRight")
    live = page.page.locator("#live")
    heard = [live.inner_text()]
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.page.keyboard.press(key)
        heard.append(live.inner_text())
    assert [re.split(": ", text)[0] for text in heard] == [
        "Full attention",
        *("SA, window 16", "SA, window 64", "SWA, window 64", "SWA, window 16", "SA, window 16"),
        "Full attention",
    ]
    assert page.page.locator(".hovertext").is_visible()
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("Enter")
    assert page.page.locator("#details-title").inner_text() == "boolq: SA, window 16"
    page.page.keyboard.press("Escape")
    assert chart.evaluate("chart => chart === document.activeElement")


def test_all_can_be_reached_and_used_with_tab_and_space(open_page: Open, one: Path) -> None:
    page = open_page(one)
    page.page.keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(80):
        page.page.keyboard.press("Tab")
        reached.append(
            page.page.evaluate(
                "(() => { const one = document.activeElement; return one.id || one.value ||"
                " one.className || one.textContent.trim(); })()"
            )
        )
        if reached[-1] == "task":
            break
    for wanted in ("axis", "bands", "all", "none", "reset", "task", "curves"):
        assert wanted in reached, reached
    assert sum("chart" in name for name in reached) == 4
    box = page.box("tasks", "boolq")
    box.focus()
    page.page.keyboard.press("Space")
    assert "boolq" not in page.titles()
    # The box is a new one, and still where the keyboard is.
    assert page.page.evaluate("document.activeElement.parentElement.innerText.trim()") == "boolq"
    page.page.keyboard.press("Space")
    assert "boolq" in page.titles()


def test_the_table_is_sorted_by_every_column(first_page: ReportPage) -> None:
    page = first_page
    page.box("tasks", "stdlib_perplexity").uncheck()  # its scores are in another unit
    heads = page.page.locator("#table thead button")
    names = [text.strip() for text in heads.all_inner_texts()]
    assert names[:4] == ["task", "method", "window", "score"]
    for index, name in enumerate(names):
        for order in ("ascending", "descending"):
            heads.nth(index).click()
            head = page.page.locator("#table th").nth(index)
            assert head.get_attribute("aria-sort") == order
            cells = [row[name] for row in page.table()]
            assert len(cells) == 30
            if name == "task":
                tasks = ["average over 2 tasks", "boolq", "mmlu"]
                expected = tasks if order == "ascending" else tasks[::-1]
                assert list(dict.fromkeys(cells)) == expected
                continue
            known = [cell for cell in cells if cell != "–"]
            assert known == cells[: len(known)]  # unknown ones last, in either order
            if name == "method":
                labels = [cell.splitlines()[0].lower() for cell in cells]
                assert labels == sorted(labels, reverse=order == "descending")
                continue
            numbers = [float(re.sub(r"[^\d.e-]", "", cell)) for cell in known]
            assert numbers == sorted(numbers, reverse=order == "descending")


def test_a_saturated_score_is_marked_and_explained(first_page: ReportPage) -> None:
    page = first_page
    rows = page.page.locator("#table tbody tr")
    marked = rows.filter(has_text="°")
    assert 0 < marked.count() < rows.count()
    title = marked.first.locator("td[title]").get_attribute("title")
    assert title and "it was full attention" in title
