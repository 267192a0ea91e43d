"""The report page: one HTML file that holds all it needs and asks the network for nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

ASSETS = Path(__file__).resolve().parent / "assets"
# In the order of their use of each other.
SCRIPTS = ("state.js", "words.js", "charts.js", "panels.js", "controls.js", "table.js", "main.js")


def page(data: Mapping[str, Any], section: str = "") -> str:
    """The page that shows ``data`` (see `sa_patch.report.page.data`), plotly's code in it.

    ``section``: HTML of a section of its own, behind the charts.

    Raises:
        ValueError: if ``data`` holds a number that JSON cannot write (NaN, infinity).
    """
    from plotly.offline import get_plotlyjs

    return Template(_asset("page.html")).substitute(
        title=html.escape(f"Results: {data['title']}"),
        style=_asset("page.css"),
        data=_in_script(data),
        section=section,
        plotly=get_plotlyjs(),
        script="\n".join(_asset(name) for name in SCRIPTS),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _in_script(data: Mapping[str, Any]) -> str:
    """JSON that no text within can end or open a script element with."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
