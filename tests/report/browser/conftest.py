"""A headless browser, and report pages that must neither fail in it nor ask the network."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from sa_patch.report.build import read_report, report_page
from tests.report.browser.report_page import ReportPage, launch, new_tab
from tests.sweep.run_builder import plausible_run

TASKS = ("boolq", "mmlu", "stdlib_perplexity")
Open = Callable[..., ReportPage]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = launch(playwright)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sweeps of two models with the same methods; the second lacks a task and has more windows."""
    folder = tmp_path_factory.mktemp("runs")
    return (
        plausible_run(folder / "first", TASKS, windows=(16, 64, 256), model_name="model-a"),
        plausible_run(
            folder / "second",
            TASKS[:2],
            windows=(16, 32, 64, 256),
            model_name="model-b",
            model="sha256:" + "cd" * 32,
        ),
    )


@pytest.fixture(scope="session")
def one(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the first run."""
    return written([runs[0]], tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def both(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of both runs."""
    return written(runs, tmp_path_factory.mktemp("both"))


def written(runs: Sequence[Path], folder: Path) -> Path:
    """The page alone: drawing the figures beside it takes seconds."""
    file = folder / "report.html"
    file.write_text(report_page(read_report(runs)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def opened_once(browser: Browser, one: Path) -> ReportPage:
    return ReportPage(new_tab(browser), one)


@pytest.fixture
def first_page(opened_once: ReportPage) -> Iterator[ReportPage]:
    """The page of the first run as it is at first, for tests that only read what is chosen."""
    opened_once.page.evaluate("location.hash = ''")
    opened_once.page.wait_for_timeout(100)
    opened_once.draw_all()
    assert opened_once.page.locator("#axis").input_value() == "window"
    yield opened_once
    assert opened_once.complaints == []


@pytest.fixture(scope="session")
def tabs() -> list[Page]:
    """Those that show nothing at the moment."""
    return []


@pytest.fixture
def open_page(browser: Browser, tabs: list[Page]) -> Iterator[Open]:
    """Opens pages; none of them may have complained when the test is over."""
    pages: list[ReportPage] = []

    def opened(file: Path, **options: object) -> ReportPage:
        tab = tabs.pop() if tabs else new_tab(browser)
        page = ReportPage(tab, file, **options)  # type: ignore[arg-type]
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
        tabs.append(page.page)
    assert [complaint for page in pages for complaint in page.complaints] == []
