"""The depth figure: accuracy by the place of the needle in the text, a row for each method."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_patch.figures.layout import FONT, Caption, Layout
from sa_patch.report.aggregate import Comparison, Point
from sa_patch.report.series import Series

COLUMNS = 5  # panels in a row, at most
CELL = (0.36, 0.19)  # inches for one score
CHARACTER = 0.075  # inches
LEAST_WIDTH = 1.5  # inches of a panel: its label needs as much
LIGHT_FROM = 0.6  # the colour map is light from here on, and takes black figures


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
    names = [_row_name(series, window) for series, window in rows]
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
        _draw_scores(axes, [of_task.get(row) for row in rows], depths)
        axes.set_yticks(range(len(rows)), names if index % columns == 0 else [""] * len(rows))
        axes.set_title(task, fontsize=FONT + 1, loc="left")
        if index + columns >= len(tasks):
            axes.set_xlabel("depth, % of the text", fontsize=FONT)
    return layout.figure


def _row_name(series: Series, window: int | None) -> str:
    return series.label if window is None else f"{series.label}  @{window}"


def _draw_scores(axes: Axes, points: Sequence[Point | None], depths: Sequence[int]) -> None:
    found = [dict(point.by_depth) if point is not None else {} for point in points]
    shown = [[scores.get(depth, math.nan) for depth in depths] for scores in found]
    axes.imshow(shown, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    for row, scores in enumerate(shown):
        for column, score in enumerate(scores):
            if not math.isnan(score):
                axes.text(
                    column,
                    row,
                    f"{100 * score:.0f}",
                    ha="center",
                    va="center",
                    fontsize=FONT - 2,
                    color="white" if score < LIGHT_FROM else "black",
                )
    axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    axes.tick_params(labelsize=FONT - 1, length=0)
    axes.spines[:].set_visible(False)
