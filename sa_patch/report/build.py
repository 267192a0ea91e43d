"""The report on one or several run folders: tables, figures, and where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from sa_patch.errors import UserError
from sa_patch.figures.layout import Caption
from sa_patch.files.artifacts import write_figure
from sa_patch.files.atomic_write import write_whole
from sa_patch.report import captions
from sa_patch.report.accuracy_figures import (
    AXES,
    check_axis,
    check_measured,
    draw_average,
    draw_tasks,
)
from sa_patch.report.aggregate import Comparison, compare
from sa_patch.report.lengths.by_length import by_length
from sa_patch.report.lengths.depth_figure import draw_depth
from sa_patch.report.lengths.figures import LENGTH_FIGURES, draw_length_figures
from sa_patch.report.lengths.section import length_section
from sa_patch.report.lengths.tables import length_tables, markdown_length_tables
from sa_patch.report.page.build import page
from sa_patch.report.page.data import page_data
from sa_patch.report.pareto_figure import draw_pareto
from sa_patch.report.tables import csv_text, markdown_tables, print_tables
from sa_patch.sweep.results import Cell, Run, SetAside, load_run, merge_cells


@dataclass(frozen=True)
class Report:
    """What the run folders say, before it is put into words or pictures."""

    runs: tuple[Run, ...]
    cells: tuple[Cell, ...]
    comparison: Comparison
    set_aside: tuple[SetAside, ...]


@dataclass(frozen=True)
class ReportFiles:
    """The files that were written. ``figures`` holds PNG and SVG, the average (if there is one)
    first."""

    report: Report
    page: Path
    markdown: Path
    csv: Path
    figures: tuple[Path, ...]

    @property
    def figure(self) -> Path:
        """The picture to look at first (PNG)."""
        return next(path for path in self.figures if path.suffix == ".png")


def read_report(run_dirs: Sequence[Path]) -> Report:
    """Raises ``UserError`` if a folder is missing, is no run, or has no finished cell."""
    if not run_dirs:
        raise UserError("no run folder given; name one or more that `sa-patch sweep` has written")
    runs = tuple(load_run(folder) for folder in dict.fromkeys(map(Path, run_dirs)))
    cells, repeated = merge_cells(runs)
    comparison = compare(cells)
    again = [
        SetAside(
            Path(cell.run) / "cells" / f"{cell.id}.json",
            "repeats a cell of another configuration that cannot differ from it",
        )
        for cell in comparison.repeated
    ]
    set_aside = [aside for run in runs for aside in run.set_aside]
    return Report(runs, tuple(cells), comparison, (*set_aside, *repeated, *again))


def write_report(
    run_dirs: Sequence[Path],
    out: Path | None = None,
    x: str = "window",
    console: Console | None = None,
) -> ReportFiles:
    """Write ``report.html``, ``results.md``, ``results.csv`` and the figures; print the table to
    ``console``.

    ``out``: the folder to write into, by default the run folder itself (several runs need one).
    ``x``: the figures' horizontal axis, "window", "mean_keys", "flops", "visited" or "seconds";
    part of the figures' names (the Pareto figure's is "mean_keys" for "window" too, and then not in
    its name).
    Every file appears whole or not at all.

    Raises ``UserError`` for an unknown axis or one along which nothing was measured, an unusable
    run folder or an unwritable ``out``.
    """
    check_axis(x)
    report = read_report(run_dirs)
    check_measured(report.comparison, x)
    if out is None and len(report.runs) > 1:
        raise UserError("a report on several runs needs a folder of its own; name it with --out")
    folder = report.runs[0].path if out is None else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw_figures(report, x)
        figures = [
            path
            for name, figure in drawn.items()
            for path in write_figure(folder / figure_name(name, x), figure)
        ]
        csv_file = folder / "results.csv"
        write_whole(csv_file, csv_text(report.comparison).encode())
        markdown_file = folder / "results.md"
        page_file = folder / "report.html"
        write_whole(page_file, report_page(report, drawn).encode())
        pictures = [path.name for path in figures if path.suffix == ".png"]
        write_whole(markdown_file, markdown(report, pictures).encode())
    except OSError as error:
        raise UserError(
            f"cannot write the report into {folder} ({error.strerror or error}); "
            "name a folder you may write with --out"
        ) from error
    if console is not None:
        print_report(report, console)
    return ReportFiles(report, page_file, markdown_file, csv_file, tuple(figures))


def report_page(report: Report, figures: Mapping[str, Figure] | None = None) -> str:
    """The page to explore the report with, as HTML; those of ``figures`` that show lengths are part
    of it."""
    notes = reading_notes(report.comparison, apart=False)
    unused = captions.set_aside_lines(report.set_aside)
    data = page_data(report.runs, report.cells, report.comparison, notes, unused)
    return page(data, length_section(report.comparison, figures or {}))


def draw_figures(report: Report, x: str) -> dict[str, Figure]:
    """The figures by name: "average" (if any task is shared by all points), "tasks", "pareto" (if
    costs were measured), "depth" (if a task scores by depth), and those of `LENGTH_FIGURES` (if
    tasks were run at several lengths)."""
    comparison, cells, runs = report.comparison, report.cells, report.runs
    figures = {}
    if comparison.averages:
        caption = Caption(
            captions.average_title(comparison, cells),
            captions.figure_notes(comparison, cells, runs, x, average=True),
        )
        figures["average"] = draw_average(comparison, x, caption)
    caption = Caption(
        captions.tasks_title(comparison, cells),
        captions.figure_notes(comparison, cells, runs, x, average=False),
    )
    figures["tasks"] = draw_tasks(comparison, x, caption)
    cost = pareto_axis(x)
    caption = Caption(
        captions.pareto_title(cells), captions.pareto_notes(comparison, cells, runs, cost)
    )
    depth_caption = Caption(captions.depth_title(cells), captions.depth_notes(cells, runs))
    for name, figure in (
        ("pareto", draw_pareto(comparison, cost, caption)),
        ("depth", draw_depth(comparison, depth_caption)),
    ):
        if figure is not None:
            figures[name] = figure
    return figures | draw_length_figures(comparison, cells, runs)


def pareto_axis(x: str) -> str:
    """What the Pareto figure has as cost: a window is none, the keys that it let through are."""
    return "mean_keys" if x == "window" else x


def figure_name(name: str, x: str) -> str:
    """The file name of a figure, without its ending."""
    if name == "depth" or name in LENGTH_FIGURES:
        return name
    if name == "pareto":
        return name if pareto_axis(x) == "mean_keys" else f"{name}_vs_{x}"
    return f"{name}_vs_{x}"


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """The report as Markdown; ``pictures`` are the figure files beside it."""
    comparison = report.comparison
    lines = [f"# Results: {captions.models(report.cells)}", ""]
    for note in (captions.missing_note(report.runs), captions.subset_note(report.cells)):
        if note:
            lines += [f"**{note}**", ""]
    for name in pictures:
        lines += [f"![{name.rsplit('.', 1)[0].replace('_', ' ')}]({name})", ""]
    found = by_length(comparison)
    if found is not None:
        lines += [markdown_length_tables(length_tables(found)), ""]
    lines += [markdown_tables(comparison), "", "## How to read this", ""]
    lines += [f"- {note}" for note in reading_notes(comparison)]
    lines += ["", "## Where the figures come from", ""]
    lines += [f"- {line}" for line in captions.provenance(report.runs, report.cells, comparison)]
    if report.set_aside:
        lines += ["", "## Files that were not used", ""]
        lines += [f"- {line}" for line in captions.set_aside_lines(report.set_aside)]
    return "\n".join(lines) + "\n"


def reading_notes(comparison: Comparison, apart: bool = True) -> list[str]:
    notes = [
        "Accuracies are in %, as value ± one standard error; a perplexity (↓) is better when "
        "lower and never enters an average. A value is the mean over seeds.",
        captions.average_note(comparison),
        captions.error_note(comparison) + " The bars describe each point by itself; all methods "
        "answer the same items, so a difference between two is known better than they suggest.",
        *(captions.axis_note(comparison, x, apart) for x in AXES),
    ]
    if any(point.saturated for point in comparison.points):
        notes.append(
            "° marks a saturated point: for at least half of the sequences the pattern left no "
            "earlier token out, so it was full attention there and says little about sparsity."
        )
    return notes


def print_report(report: Report, console: Console) -> None:
    """The table in the terminal, with what is missing, what was set aside, and provenance."""
    comparison = report.comparison
    console.print(f"[bold]Results: {captions.models(report.cells)}[/bold]\n", highlight=False)
    print_tables(comparison, console)
    notes = [captions.average_note(comparison), captions.error_note(comparison)]
    if any(point.saturated for point in comparison.points):
        notes.append("° saturated: full attention in at least half of the sequences.")
    notes += captions.provenance(report.runs, report.cells, comparison)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)
    missing = captions.missing_note(report.runs)
    if missing:
        console.print(missing, style="yellow", highlight=False, markup=False)
    for line in captions.set_aside_lines(report.set_aside):
        console.print(f"not used: {line}", style="yellow", highlight=False, markup=False)
