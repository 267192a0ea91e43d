"""The needle figure: accuracy by the needle's depth and the text's length, a panel per pattern."""

from __future__ import annotations

import math
import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.report.lengths.by_length import ByLength, Row, row_name
from sa_patch.report.lengths.heatmap import draw_scores

COLUMNS = 6  # panels in a row, at most
CELL = (0.5, 0.2)  # inches for one score
LEAST_WIDTH = 1.55  # inches of a panel: its title is set in two lines of it
CHARACTERS = 15  # of a title, for each inch


def draw_needles(found: ByLength, caption: Caption) -> Figure | None:
    """For each task whose scores are known by depth a row of panels; None if there is none."""
    tasks = [
        task
        for task in found.tasks
        if any(point.by_depth for (_, own, _), point in found.points.items() if own == task)
    ]
    if not tasks:
        return None
    columns = min(len(found.rows), COLUMNS)
    lines = math.ceil(len(found.rows) / columns)
    depths = sorted({depth for point in found.points.values() for depth, _ in point.by_depth})
    width = max(len(found.lengths) * CELL[0], LEAST_WIDTH)
    layout = Layout(
        caption,
        [],
        (lines * len(tasks), columns),
        (width, len(depths) * CELL[1]),
        panel_titles=True,
        left=0.9,
        gap=0.25,
    )
    for place, task in enumerate(tasks):
        for index, row in enumerate(found.rows):
            axes = layout.panel(place * lines * columns + index)
            _draw_panel(axes, found, row, task, depths)
            name = textwrap.wrap(row_name(row), int(width * CHARACTERS), max_lines=2)
            axes.set_title("\n".join(name), fontsize=FONT - 1, loc="left")
            if index % columns == 0:
                axes.set_ylabel(f"{task}\ndepth, % of the text", fontsize=FONT - 1)
            else:
                axes.set_yticklabels([])
            axes.set_xlabel("tokens", fontsize=FONT - 1)
    return layout.figure


def _draw_panel(axes: Axes, found: ByLength, row: Row, task: str, depths: list[int]) -> None:
    known = {
        length: dict(point.by_depth)
        for length in found.lengths
        if (point := found.points.get((row, task, length))) is not None
    }
    shown = [
        [known.get(length, {}).get(depth, math.nan) for length in found.lengths] for depth in depths
    ]
    draw_scores(axes, shown, [f"{length:,}" for length in found.lengths])
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
