"""A comparison as tables: CSV (every figure, raw units), Markdown and the terminal."""

import csv
import io
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from sa_patch.report.aggregate import AVERAGE, Comparison, Point
from sa_patch.report.series import Series

CSV_COLUMNS = (
    "kind", "series", "method", "pattern", "window", "task", "metric", "higher_is_better", "value",
    "error", "seed_error", "sampling_error", "seeds", "samples", "chance", "mean_keys_per_query",
    "last_query_keys", "mean_prompt_length", "attention_flops_per_sequence",
    "full_attention_flops_per_sequence", "flops_share_of_full", "model_seconds_per_sequence",
    "saturated_fraction", "saturated",
)  # fmt: skip
SATURATED = "°"
Row = tuple[Series, int | None]


def csv_text(comparison: Comparison) -> str:
    """One line per point: ``kind`` is "task", or "average" for the mean over tasks. Raw units:
    accuracies as fractions of 1; ``seeds`` separated by spaces; unknown figures are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    visited = _knows_visited(comparison)
    writer.writerow([*CSV_COLUMNS, *(["visited_share_of_full"] if visited else [])])
    for point in (*comparison.averages, *comparison.points):
        writer.writerow(
            [
                "average" if point.task == AVERAGE else "task",
                point.series.label,
                point.series.method,
                point.pattern,
                _blank(point.window),
                ";".join(comparison.average_tasks) if point.task == AVERAGE else point.task,
                point.metric,
                str(point.higher_is_better).lower(),
                point.value,
                _blank(point.error),
                _blank(point.seed_error),
                _blank(point.sampling_error),
                " ".join(str(seed) for seed in point.seeds if seed is not None),
                _blank(point.samples),
                _blank(point.chance),
                _blank(point.mean_keys),
                _blank(point.last_query_keys),
                _blank(point.prompt_mean),
                _blank(point.flops),
                _blank(point.full_flops),
                _blank(point.flops_share),
                _blank(point.seconds),
                _blank(point.saturated_fraction),
                str(point.saturated).lower(),
                *([_blank(point.visited_share)] if visited else []),
            ]
        )
    return buffer.getvalue()


def markdown_tables(comparison: Comparison) -> str:
    """Scores with their errors, then what each point cost, as wide tables (a column per task)."""
    parts: list[tuple[str, Callable[[Point], str]]] = [
        ("Scores", score_text),
        ("Keys per query, measured mean", lambda point: _figure(point.mean_keys)),
        ("Keys the last query saw, measured mean", lambda point: _figure(point.last_query_keys)),
        ("Attention FLOPs, % of full attention", lambda point: _percent(point.flops_share)),
        ("Saturated sequences, %", lambda point: _percent(point.saturated_fraction)),
    ]
    if _knows_visited(comparison):
        title = "Keys that a tile reads (blocks of 16), % of full attention"
        parts.insert(-1, (title, lambda point: _percent(point.visited_share)))
    return "\n\n".join(
        f"## {title}\n\n{_markdown_table(comparison, text)}" for title, text in parts
    )


def _knows_visited(comparison: Comparison) -> bool:
    """Whether any point has visited keys: runs from before they were counted have none."""
    return any(point.visited_share is not None for point in comparison.points)


def print_tables(comparison: Comparison, console: Console) -> None:
    """The scores, and the cost as means over tasks, in as many tables as the width asks for."""
    rows = _rows(comparison)
    columns: list[tuple[str, list[str]]] = []
    if len(comparison.average_tasks) > 1:
        columns.append(
            ("average\n%", [_cell(comparison, row, AVERAGE, score_text) for row in rows])
        )
    for task in comparison.tasks:
        columns.append(
            (
                f"{_folded(task)}\n{_unit(comparison.of_task(task)[0])}",
                [_cell(comparison, row, task, score_text) for row in rows],
            )
        )
    columns.append(("keys/\nquery", [_cost(comparison, row, "mean_keys") for row in rows]))
    columns.append(("FLOPs %\nof full", [_cost(comparison, row, "flops_share") for row in rows]))
    if _knows_visited(comparison):
        columns.append(
            ("visited %\nof full", [_cost(comparison, row, "visited_share") for row in rows])
        )
    columns.append(
        ("satu-\nrated %", [_cost(comparison, row, "saturated_fraction") for row in rows])
    )
    stub = max(len(series.label) for series, _ in rows) + 14
    for group in _grouped(columns, console.width - stub):
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("method", no_wrap=True)
        table.add_column("window", justify="right", no_wrap=True)
        for header, _ in group:
            table.add_column(header, justify="right", no_wrap=True)
        for index, (series, window) in enumerate(rows):
            last = index + 1 == len(rows) or rows[index + 1][0] != series
            table.add_row(
                series.label,
                "" if window is None else str(window),
                *(texts[index] for _, texts in group),
                end_section=last,
            )
        console.print(table)
        console.print()


def score_text(point: Point) -> str:
    """``36.2 ±5.0`` (accuracies in %), with a ring where the point is saturated."""
    scale = 100.0 if point.is_accuracy else 1.0
    value, error = point.value * scale, point.error
    if point.is_accuracy:
        text = f"{value:.1f}" + ("" if error is None else f" ±{error * scale:.1f}")
    else:
        text = _figure(value) + ("" if error is None else f" ±{_figure(error)}")
    return text + (SATURATED if point.saturated else "")


def _rows(comparison: Comparison) -> list[Row]:
    return list(dict.fromkeys((point.series, point.window) for point in comparison.points))


def _find(comparison: Comparison, row: Row, task: str) -> Point | None:
    points = comparison.averages if task == AVERAGE else comparison.points
    return next((p for p in points if p.task == task and (p.series, p.window) == row), None)


def _cell(comparison: Comparison, row: Row, task: str, text: Callable[[Point], str]) -> str:
    point = _find(comparison, row, task)
    return "-" if point is None else text(point)


def _cost(comparison: Comparison, row: Row, name: str) -> str:
    """The mean of a measured figure over the tasks that this point has."""
    known = [getattr(p, name) for p in comparison.points if (p.series, p.window) == row]
    if not known or any(value is None for value in known):
        return "-"
    mean = sum(known) / len(known)
    return _figure(mean) if name == "mean_keys" else _percent(mean)


def _markdown_table(comparison: Comparison, text: Callable[[Point], str]) -> str:
    tasks = ([AVERAGE] if len(comparison.average_tasks) > 1 else []) + list(comparison.tasks)
    header = ["method", "window"]
    for task in tasks:
        unit = ""
        if text is score_text:
            unit = "%" if task == AVERAGE else _unit(comparison.of_task(task)[0])
        header.append(f"{task} {unit}".strip().replace("|", "\\|"))
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for row in _rows(comparison):
        series, window = row
        lines.append(
            [series.label.replace("|", "\\|"), "" if window is None else str(window)]
            + [_cell(comparison, row, task, text) for task in tasks]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _unit(point: Point) -> str:
    metric = point.metric.split(",")[0]
    if point.is_accuracy:
        return f"{metric} %"
    return metric if point.higher_is_better else f"{metric} ↓"


def _grouped(
    columns: Sequence[tuple[str, list[str]]], width: int
) -> list[list[tuple[str, list[str]]]]:
    groups: list[list[tuple[str, list[str]]]] = []
    used = width + 1
    for header, texts in columns:
        size = 3 + max(len(line) for text in (header, *texts) for line in text.split("\n"))
        if used + size > width:
            groups.append([])
            used = 0
        groups[-1].append((header, texts))
        used += size
    return groups


def _folded(task: str) -> str:
    """A long task name over several lines, so that a column is no wider than its figures."""
    return task.replace("_", "_\n").replace(" (", "\n(") if len(task) > 10 else task


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else _figure(100 * share)


def _blank(value: object) -> object:
    return "" if value is None else value
