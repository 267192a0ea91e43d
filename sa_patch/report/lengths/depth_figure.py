"""The depth figure: accuracy by the place of the needle in the text, a row for each method."""

import math

from matplotlib.figure import Figure

from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.report.aggregate import Comparison
from sa_patch.report.lengths.by_length import row_name
from sa_patch.report.lengths.heatmap import draw_scores

COLUMNS = 5  # panels in a row, at most
CELL = (0.36, 0.19)  # inches for one score
CHARACTER = 0.075  # inches
LEAST_WIDTH = 1.5  # inches of a panel: its label needs as much


def draw_depth(comparison: Comparison, caption: Caption) -> Figure | None:
    """One panel per task whose cells carry scores by depth; rows as in the tables.

    ``None`` if no task does.
    """
    tasks = [
        task
        for task in comparison.tasks
        if any(point.by_depth for point in comparison.of_task(task))
    ]
    if not tasks:
        return None
    points = [point for point in comparison.points if point.by_depth]
    rows = list(dict.fromkeys((point.series, point.window) for point in points))
    names = [row_name(row) for row in rows]
    depths = sorted({depth for point in points for depth, _ in point.by_depth})
    lines = math.ceil(len(tasks) / COLUMNS)
    columns = math.ceil(len(tasks) / lines)
    layout = Layout(
        caption,
        [],
        (lines, columns),
        (max(len(depths) * CELL[0], LEAST_WIDTH), len(rows) * CELL[1]),
        panel_titles=True,
        left=0.3 + CHARACTER * max(map(len, names)),
        gap=0.3,
    )
    for index, task in enumerate(tasks):
        axes = layout.panel(index)
        of_task = {(point.series, point.window): point for point in comparison.of_task(task)}
        known = [dict(of_task[row].by_depth) if row in of_task else {} for row in rows]
        shown = [[scores.get(depth, math.nan) for depth in depths] for scores in known]
        draw_scores(axes, shown, [str(depth) for depth in depths])
        axes.set_yticks(range(len(rows)), names if index % columns == 0 else [""] * len(rows))
        axes.set_title(task, fontsize=FONT + 1, loc="left")
        if index + columns >= len(tasks):
            axes.set_xlabel("depth, % of the text", fontsize=FONT)
    return layout.figure
