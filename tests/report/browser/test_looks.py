"""The page at several widths, in light and dark, printed, and against the law that it asks for
nothing from outside."""

import re
from pathlib import Path

import pytest

from sa_patch.report.page.colours import contrast
from tests.report.browser.conftest import Open
from tests.report.browser.report_page import ReportPage
from tests.thorough import unless_thorough

WIDTHS = (320, 375, 800, 1400)


def text_contrasts(page: ReportPage) -> dict[str, float]:
    """The contrast of every element's own text with what lies behind it."""
    pairs: list[list[str]] = page.page.evaluate(
        """() => [...document.querySelectorAll("body *")].flatMap((one) => {
          const own = [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
          const unread = one.closest("script, svg, option, .unseen");
          if (!own || unread || !one.checkVisibility()) return [];
          let behind = one;
          while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)")
            behind = behind.parentElement;
          const ground = getComputedStyle(behind || document.body).backgroundColor;
          return [[one.textContent.trim().slice(0, 40), getComputedStyle(one).color, ground]];
        })"""
    )
    return {text: contrast(hexadecimal(ink), hexadecimal(ground)) for text, ink, ground in pairs}


def hexadecimal(colour: str) -> str:
    numbers = [int(float(part)) for part in re.findall(r"[\d.]+", colour)[:3]]
    return "#" + "".join(f"{number:02x}" for number in numbers)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read_in_light_and_dark(open_page: Open, both: Path, dark: bool) -> None:
    page = open_page(both, dark=dark)
    found = text_contrasts(page)
    assert len(found) > 60
    assert min(found.values()) >= 4.5, sorted(found.items(), key=lambda pair: pair[1])[:3]
    ground = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    ticks = page.page.locator(".xtick text").first.evaluate("one => getComputedStyle(one).fill")
    assert contrast(hexadecimal(ticks), hexadecimal(ground)) >= 4.5
    for mark in page.page.locator(".scatterlayer path.point").all()[:12]:
        stroke = mark.evaluate("one => getComputedStyle(one).stroke")
        assert contrast(hexadecimal(stroke), hexadecimal(ground)) >= 3


def test_a_change_of_the_scheme_changes_the_charts(open_page: Open, one: Path) -> None:
    page = open_page(one)
    light = page.page.locator(".xtick text").first.evaluate("one => getComputedStyle(one).fill")
    page.page.emulate_media(color_scheme="dark")
    page.page.wait_for_timeout(100)
    page.draw_all()
    dark = page.page.locator(".xtick text").first.evaluate("one => getComputedStyle(one).fill")
    assert contrast(hexadecimal(light), "#ffffff") > 10
    assert contrast(hexadecimal(dark), "#000000") > 10


@pytest.mark.parametrize("width", unless_thorough((320,), WIDTHS))
def test_nothing_sticks_out_at_any_width(open_page: Open, both: Path, width: int) -> None:
    page = open_page(both, width=width)
    for address in ("", "#columns=runs", "#view=pareto&columns=models"):
        page.page.evaluate("address => { location.hash = address; }", address)
        page.page.wait_for_timeout(100)
        page.draw_all()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    folded = page.page.locator("#fold").get_attribute("open") is None
    assert folded == (width < 900)
    page.page.evaluate("location.hash = ''")
    page.page.wait_for_timeout(100)
    page.draw_all()
    for index in range(page.page.locator(".panel").count()):
        panel, drawing = (
            page.page.locator(".panel").nth(index).locator(name).first.bounding_box()
            for name in ("xpath=.", ".main-svg")
        )
        assert panel and drawing and drawing["width"] <= panel["width"]


def test_on_a_phone_the_controls_unfold_and_work(open_page: Open, one: Path) -> None:
    page = open_page(one, width=375, height=700)
    assert page.page.locator("#axis").is_hidden()
    page.page.locator("#fold > summary").click()
    page.choose("flops")
    page.draw_all()
    title = page.chart("boolq").locator(".xtitle").text_content()
    assert title == "attention FLOPs, % of full attention"


def test_print_is_light_whole_and_without_controls(open_page: Open, one: Path) -> None:
    page = open_page(one, dark=True)
    screen = page.chart("boolq").locator(".main-svg").first.bounding_box()
    page.page.emulate_media(media="print")
    page.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for name in ("#controls", "td.command", ".lead"):
        assert page.page.locator(name).first.is_hidden()
    assert page.page.locator(".chart:not([data-drawn])").count() == 0
    for chart in page.page.locator(".chart").all():
        box = chart.locator(".main-svg").first.bounding_box()
        assert box and box["width"] == 330
    tick = page.page.locator(".xtick text").first.evaluate("one => getComputedStyle(one).fill")
    assert contrast(hexadecimal(tick), "#ffffff") > 10
    page.page.emulate_media(media="screen")
    page.page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.draw_all()
    assert page.chart("boolq").locator(".main-svg").first.bounding_box() == screen
    # The browser itself sends these events.
    assert page.page.pdf(format="A4").startswith(b"%PDF")


def test_the_page_may_ask_for_nothing_from_outside(open_page: Open, one: Path) -> None:
    page = open_page(one)
    refused = page.page.evaluate(
        "fetch('https://example.com/').then(() => 'fetched', (error) => String(error))"
    )
    assert "TypeError" in refused
    # The browser's word that the page's own policy forbids it.
    assert any("Content Security Policy" in text for text in page.complaints)
    page.complaints.clear()
