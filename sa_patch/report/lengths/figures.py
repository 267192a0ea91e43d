"""The three pictures of lengths, with their captions."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from sa_patch.figures.layout import Caption
from sa_patch.report import captions
from sa_patch.report.aggregate import Comparison
from sa_patch.report.lengths.by_length import KEPT, by_length
from sa_patch.report.lengths.length_figure import draw_lengths
from sa_patch.report.lengths.needle_figure import draw_needles
from sa_patch.report.lengths.tables import averaged_tasks, draw_length_table, length_tables
from sa_patch.sweep.results import Cell, Run

# By name, what a reader who sees none of it is told.
LENGTH_FIGURES = {
    "length_table": "The table of averages by length, as a picture",
    "lengths": "Scores against length, a line for each pattern, and the share of full attention's "
    "FLOPs that each spends; the tables above hold the figures",
    "needles": "Heatmaps of accuracy by the needle's depth and the text's length, a panel for each "
    "pattern",
}


def draw_length_figures(
    comparison: Comparison, cells: Sequence[Cell], runs: Sequence[Run]
) -> dict[str, Figure]:
    """The pictures that the results allow, by the names of `LENGTH_FIGURES`."""
    found = by_length(comparison)
    if found is None:
        return {}
    model = captions.models(cells)
    cautions = [note for note in (captions.subset_note(cells), captions.missing_note(runs)) if note]
    average = (
        "An average is over the tasks that every pattern has at that length "
        f"({averaged_tasks(found) or 'there are none'}): where they differ, compare patterns and "
        "not lengths. FLOPs: measured attention FLOPs of the prompts, of full attention's on the "
        "same ones."
    )
    kept = (
        f"Kept up to: the longest length up to which the score, there and at every shorter one, is "
        f"at least {100 * KEPT:.0f}% of full attention's."
    )
    needles = (
        "Accuracy in %, mean over seeds, on the items whose needle lies near this depth: 0 is the "
        "beginning of the text, 100 its end. White: no item there."
    )
    figures: dict[str, Figure | None] = {
        "length_table": draw_length_table(
            length_tables(found), Caption(f"{model}: by length", [average, kept, *cautions])
        ),
        "lengths": draw_lengths(
            found, comparison, Caption(f"{model}: score against length", [average, *cautions])
        ),
        "needles": draw_needles(
            found,
            Caption(f"{model}: needles by depth and length", [needles, *cautions]),
        ),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
