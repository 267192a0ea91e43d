"""The page of the paper's whole grid: how fast it opens, what it weighs, and pictures to look at.

``python -m tests.report.browser.look FOLDER``; the results are made up, as many as the paper has.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from sa_patch.report.build import read_report, report_page
from tests.report.browser.report_page import ReportPage, launch, new_tab
from tests.sweep.run_builder import paper_grid

OPENINGS = 5
# Name, width and height of the screen, and whether it is dark.
SCREENS = (
    ("wide", 1400, 1000, False),
    ("wide-dark", 1400, 1000, True),
    ("tablet", 800, 1100, True),
    ("phone", 375, 800, False),
)


def opening(browser: Browser, file: Path) -> tuple[float, float]:
    """Seconds until the browser shows the words and the table, and until all charts are drawn."""
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    start = time.perf_counter()
    page.goto(f"file://{file}")
    while page.locator(".chart:not([data-drawn])").count():
        page.wait_for_timeout(20)
    whole = time.perf_counter() - start
    first = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.context.close()
    return first / 1000, whole


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "report.html").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        report = read_report(paper_grid(Path(scratch)))
        file.write_text(report_page(report), encoding="utf-8")
        points = len(report.comparison.points) + len(report.comparison.averages)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        times = [opening(browser, file) for _ in range(OPENINGS)]
        tab = new_tab(browser)
        for name, width, height, dark in SCREENS:
            page = ReportPage(tab, file, width=width, height=height, dark=dark)
            page.page.screenshot(path=folder / f"{name}.png")
            page.close()
        page = ReportPage(tab, file, dark=True)
        page.page.pdf(path=folder / "print.pdf", format="A4")
        browser.close()
    first, whole = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{points} points, {file.stat().st_size / 1e6:.2f} MB: to be read after {first:.2f} s, "
        f"all charts drawn after {whole:.2f} s (medians of {OPENINGS} openings)\n"
        f"pictures to look at: {folder}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
