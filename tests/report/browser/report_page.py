"""A report page in a browser: opening it, and reading what it draws from the drawing itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--disable-gpu", "--disable-background-networking", "--no-first-run")

# Every mark of a chart: the name of its series, its place in the axes' own units, whether it is
# hollow. Places are those of the drawing, turned back with the axes' ranges and lengths.
READ_MARKS = """
chart => {
  const { xaxis, yaxis } = chart._fullLayout;
  const back = (axis, share) => {
    const [low, high] = axis.range;
    const value = low + share * (high - low);
    return axis.type === "log" ? 10 ** value : value;
  };
  const unit = (x, y) => [back(xaxis, x / xaxis._length), back(yaxis, 1 - y / yaxis._length)];
  const found = { marks: [], bands: [], lines: [] };
  for (const trace of chart._fullData) {
    const group = chart.querySelector(`.scatterlayer .trace${trace.uid}`);
    if (!group) continue;
    for (const mark of group.querySelectorAll("path.point")) {
      const [x, y] = mark.getAttribute("transform").match(/-?[\\d.]+/g).map(Number);
      found.marks.push([trace.name, ...unit(x, y), getComputedStyle(mark).fill === "none" ||
        getComputedStyle(mark).fillOpacity === "0"]);
    }
    const corners = (path) => path.getAttribute("d").match(/-?[\\d.]+,-?[\\d.]+/g)
      .map((pair) => unit(...pair.split(",").map(Number)));
    for (const line of group.querySelectorAll("path.js-line")) {
      if (trace.line.width && line.getAttribute("d")) {
        found.lines.push([trace.name, trace.line.shape]);
      }
    }
  }
  for (const fill of chart.querySelectorAll("path.js-fill")) {
    const pairs = fill.getAttribute("d").match(/-?[\\d.]+,-?[\\d.]+/g);
    found.bands.push(pairs.map((pair) => unit(...pair.split(",").map(Number))));
  }
  return found;
}
"""


def browser_path() -> str | None:
    """Of the browser that ``scripts/setup_browser`` chose, or that is on the path."""
    named = os.environ.get("SA_PATCH_BROWSER")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def launch(playwright: Any) -> Browser:
    """A headless browser; pages from disk may read the clipboard in it."""
    path = browser_path()
    assert path, "no browser: scripts/check_page and scripts/test install Chromium"
    # Chromium refuses to run as root, as in a container, with the sandbox that it has by default.
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    browser: Browser = playwright.chromium.launch(executable_path=path, args=flags)
    return browser


def new_tab(browser: Browser) -> Page:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page: Page = context.new_page()
    page.set_default_timeout(20_000)
    return page


class ReportPage:
    """One opened page. ``complaints`` gathers its errors, and all that it asked the network for.

    A tab may show one after another: in a used one the browser need not compile the scripts again.
    """

    def __init__(
        self,
        tab: Page,
        file: Path,
        *,
        width: int = 1400,
        height: int = 1000,
        dark: bool = False,
        address: str = "",
    ) -> None:
        self.page = tab
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(color_scheme="dark" if dark else "light", media="screen")
        self.complaints: list[str] = []
        self._listeners: dict[Any, Any] = {
            "console": lambda message: self.complaints.append(message.text),
            "pageerror": lambda error: self.complaints.append(str(error)),
            "request": lambda request: self._asked(request.url),
        }
        for event, listener in self._listeners.items():
            tab.on(event, listener)
        tab.goto(f"file://{file}{address}")
        self.draw_all()

    def _asked(self, url: str) -> None:
        if not url.startswith(("file://", "data:", "blob:")):
            self.complaints.append(f"asked for {url}")

    def close(self) -> None:
        self.page.goto("about:blank")
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)

    def draw_all(self) -> None:
        """Wait until every chart is drawn."""
        while self.page.locator(".chart:not([data-drawn])").count():
            self.page.wait_for_timeout(30)

    def titles(self) -> list[str]:
        """What the panels say they show, without the number of items."""
        headings: list[str] = self.page.locator(".panel h3").evaluate_all(
            "all => all.map(one => one.firstChild.textContent)"
        )
        return headings

    def chart(self, title: str) -> Locator:
        """The chart of the panel of that title."""
        return self.page.locator(".panel").nth(self.titles().index(title)).locator(".chart")

    def drawn(self, title: str) -> Mapping[str, Any]:
        """``marks`` (name, x, y, hollow), ``bands`` (corners) and ``lines`` (name, shape)."""
        self.draw_all()
        found: Mapping[str, Any] = self.chart(title).evaluate(READ_MARKS)
        return found

    def names(self, title: str) -> set[str]:
        """The series with marks in a chart."""
        return {mark[0] for mark in self.drawn(title)["marks"]}

    def choose(self, axis: str) -> None:
        self.page.locator("#axis").select_option(axis)

    def box(self, fieldset: str, label: str) -> Locator:
        """The box of one choice."""
        row = self.page.locator(f"#{fieldset} label").filter(
            has=self.page.get_by_text(label, exact=True)
        )
        return row.locator("input") if row.count() else self._exact(fieldset, label)

    def _exact(self, fieldset: str, label: str) -> Locator:
        rows = self.page.locator(f"#{fieldset} label")
        texts = [text.strip() for text in rows.all_inner_texts()]
        return rows.nth(texts.index(label)).locator("input")

    def radio(self, value: str) -> None:
        self.page.locator(f"input[type=radio][value={value}]").check()

    def table(self) -> list[dict[str, str]]:
        """The rows by column."""
        head = [text.rstrip(" ▲▼") for text in self.page.locator("#table th").all_inner_texts()]
        rows: list[list[str]] = self.page.locator("#table tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
        )
        return [dict(zip(head, row, strict=True)) for row in rows]
