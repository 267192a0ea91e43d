"""What the report page shows of lengths: tables and pictures, as HTML that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from sa_patch.files.png import png
from sa_patch.report.aggregate import Comparison
from sa_patch.report.lengths.by_length import KEPT, by_length
from sa_patch.report.lengths.figures import LENGTH_FIGURES
from sa_patch.report.lengths.tables import LengthTable, length_tables

INTRODUCTION = (
    "Tasks that were run at several lengths. An average is over the tasks that every pattern has "
    "at a length; “kept up to” is the longest length up to which a pattern's score, there and at "
    f"every shorter one, is at least {100 * KEPT:.0f}% of full attention's."
)


def length_section(comparison: Comparison, figures: Mapping[str, Figure]) -> str:
    """The section, empty if nothing was run at several lengths.

    Args:
        figures: those of a report by name; the page's table needs no picture.
    """
    found = by_length(comparison)
    if found is None:
        return ""
    tables = length_tables(found)
    shown = "\n".join(
        _picture(LENGTH_FIGURES[name], figures[name])
        for name in ("lengths", "needles")
        if name in figures
    )
    first, *rest = (_table(table) for table in tables)
    more = f"<details><summary>Task by task</summary>\n{''.join(rest)}</details>" if rest else ""
    return (
        '<section aria-labelledby="lengths">\n<h2 id="lengths">By length</h2>\n'
        f"<p>{html.escape(INTRODUCTION)}</p>\n{first}{more}\n{shown}\n</section>"
    )


def _table(table: LengthTable) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        first, *rest = map(html.escape, cells)
        numbers = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in rest)
        return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"

    title = html.escape(table.title)
    return (
        f'<h3>{title}</h3>\n<div class="scroll" tabindex="0" role="region" aria-label="{title}">\n'
        f"<table><thead>{row(table.heading, 'th')}</thead>\n"
        f"<tbody>{''.join(row(cells, 'td') for cells in table.rows)}</tbody></table></div>\n"
    )


def _picture(words: str, figure: Figure) -> str:
    code = base64.b64encode(png(figure)).decode("ascii")
    return f'<img class="picture" src="data:image/png;base64,{code}" alt="{html.escape(words)}">'
