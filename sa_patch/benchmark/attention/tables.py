"""A benchmark as text: a Markdown table for each length, and a summary for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from sa_patch.benchmark.attention.candidates import BASELINE
from sa_patch.benchmark.attention.record import (
    STATUSES,
    TIMED,
    WRONG,
    Bench,
    Cell,
    Rates,
    paired_ratios,
)
from sa_patch.benchmark.clock import Ceilings

AUTO = "*"
COLUMNS = (
    *("what", "backend", "ms", "quartiles", "times", "x SDPA full", "TFLOP/s", "GB/s", "x floor"),
    *("memory", "error"),
)
NOTES = f"""\
- **ms**: median of single calls, and their quartiles. The cells of a length are called in turn, in
  a new random order each round. Every call has a fresh `layer`: drawing stochastic attention's
  permutation and planning its work are in the time.
- **x SDPA full**: time of `scaled_dot_product_attention(is_causal=True)` at this length over the
  cell's; above 1 is faster. Each call is compared with the call of SDPA nearest to it in time, so
  that a drift of the machine cancels; median and quartiles of these ratios.
- **TFLOP/s**, **GB/s**: FLOPs that the pattern needs (visible pairs, and MoBA's choosing of blocks)
  and fewest bytes (q, k, v read once, result written once) over the time; in brackets the share of
  the machine's measured ceiling (the best of many, before and after).
- **x floor**: time over the time at which the nearer ceiling would be met.
- **memory**: peak with inputs and result, over inputs and result alone.
- **error**: largest absolute difference from a float64 oracle over a sample of queries. A cell that
  fails this check has no time.
- `{AUTO}` marks the backend that `auto` takes."""


def number(value: float) -> str:
    """Three figures: ``0.0123``, ``4.56``, ``789``, ``12,345``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def ceilings_line(ceilings: Ceilings) -> str:
    """The machine's ceilings in one line."""
    return (
        f"ceilings: copy {number(ceilings.copy_gb_per_s)} GB/s (read and written, "
        f"{ceilings.copy_bytes >> 20} MiB), matrix product {number(ceilings.matmul_tflop_per_s)} "
        f"TFLOP/s (side {ceilings.matmul_size}); best of {len(ceilings.copy_ms)}"
    )


def cell_line(bench: Bench, cell: Cell) -> str:
    """One finished cell in one line."""
    name = f"  {cell.label:30s} {_backend(cell):14s}"
    median, quartiles, found = cell.median_ms, cell.quartiles_ms, bench.rates(cell)
    if median is None or quartiles is None:
        return f"{name} {cell.status}: {cell.reason}"
    speed = (
        "" if found is None or found.speedup is None else f"  {number(found.speedup)}x SDPA full"
    )
    spread = f"({number(quartiles[0])} to {number(quartiles[1])}, {len(cell.samples_ms)} times)"
    return f"{name} {number(median):>8s} ms {spread:32s}{speed}"


def ordered(cells: Sequence[Cell]) -> list[Cell]:
    """The fastest first; cells without a time at the end, by status."""
    return sorted(cells, key=lambda cell: (STATUSES.index(cell.status), cell.median_ms or 0.0))


def markdown(bench: Bench) -> str:
    """The whole run as Markdown."""
    parts = ["# Attention benchmark", *_heading(bench)]
    if bench.wrong():
        names = ", ".join(f"{c.label} on {c.backend} at n = {c.n}" for c in bench.wrong())
        parts.append(f"**Wrong results, not timed:** {names}")
    for n in bench.lengths():
        parts.append(f"## n = {n:,}")
        parts.append(_table(bench, ordered(bench.at(n))))
    if bench.not_served:
        lines = ["## Not measured", "| what | backend | why |", "| --- | --- | --- |"]
        lines += [
            f"| {_cell(one.label)} | {_cell(one.backend)} | {_cell(one.reason)} |"
            for one in bench.not_served
        ]
        parts.append(f"{lines[0]}\n\n" + "\n".join(lines[1:]))
    return "\n\n".join([*parts, "## How to read it", NOTES]) + "\n"


def print_summary(bench: Bench, console: Any) -> None:
    """Medians and speed-ups, a column for each length; as plain text where rich is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        Console = None  # type: ignore[assignment,misc]
    rows, lengths = summary_rows(bench), bench.lengths()
    title = "median ms, and how many times faster than SDPA full"
    if Console is None or not isinstance(console, Console):
        console.print(title)
        for name, backend, texts in rows:
            joined = "  ".join(f"{text:>18s}" for text in texts)
            console.print(f"{name:30s} {backend:14s} {joined}")
        return
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("what", overflow="fold")
    table.add_column("backend", overflow="fold")
    for n in lengths:
        table.add_column(f"{n:,}", justify="right", no_wrap=True)
    for name, backend, texts in rows:
        table.add_row(name, backend, *(text.replace(" ", "\n", 1) for text in texts))
    console.print(table)
    if any(cell.automatic for cell in bench.cells):
        console.print(f"{AUTO} the backend that auto takes at some of these lengths", style="dim")


def summary_rows(bench: Bench) -> list[tuple[str, str, list[str]]]:
    """What, backend and one text for each length, in the order of the longest length."""
    names: dict[tuple[str, str], bool] = {}
    for n in reversed(bench.lengths()):
        for cell in ordered(bench.at(n)):
            key = (cell.label, cell.backend)
            names[key] = names.get(key, False) or cell.automatic
    rows = []
    for (label, backend), automatic in names.items():
        texts = []
        for n in bench.lengths():
            cells = [c for c in bench.at(n) if (c.label, c.backend) == (label, backend)]
            texts.append(_summary(bench, cells[0]) if cells else "-")
        rows.append((label, f"{backend} {AUTO}" if automatic else backend, texts))
    return rows


def ratio_table(bench: Bench, base: str = "reference") -> str:
    """Each backend's time over that of `base` for the same pattern, call by call, as Markdown.

    Medians of `paired_ratios`; a dash where either was not timed; rivals are left out.
    """
    backends = list(dict.fromkeys(c.backend for c in bench.cells if not c.rival))
    lines = [["n", "pattern", *(f"{name} / {base}" for name in backends if name != base)]]
    for n in bench.lengths():
        for label in dict.fromkeys(c.label for c in bench.at(n) if not c.rival):
            timed = {c.backend: c for c in bench.at(n) if c.label == label and c.status == TIMED}
            texts = [
                number(statistics.median(paired_ratios(timed[name], timed[base])))
                if name in timed and base in timed
                else "-"
                for name in backends
                if name != base
            ]
            lines.append([f"{n:,}", label, *texts])
    rule = ["---:", "---"] + ["---:"] * (len(lines[0]) - 2)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def threads_text(bench: Bench) -> str:
    """``1 thread``, ``2 threads``"""
    count = bench.options["threads"] or bench.provenance["hardware"]["torch_threads"]
    return f"{count} thread" + ("" if count == 1 else "s")


def _heading(bench: Bench) -> list[str]:
    options, session = bench.options, bench.provenance
    hardware, versions = session["hardware"], session["versions"]
    machine = hardware["gpus"][0] if options["device"] == "cuda" else hardware["cpu"]
    threads = "" if options["device"] == "cuda" else f", {threads_text(bench)}"
    git = session.get("git")
    commit = (
        "" if not git else f", commit {git['commit'][:12]}{' (changed)' if git['dirty'] else ''}"
    )
    kernels = [f"{name} {found}" for name, found in versions.items() if found and "fla" in name]
    packages = [f"torch {versions['torch']}", *kernels]
    if versions.get("triton"):
        packages.append(f"triton {versions['triton']}")
    shape = (
        f"{options['heads']} query and {options['kv_heads']} KV heads of {options['head_dim']}, "
        f"batch {options['batch']}, {options['dtype']}"
    )
    lines = [
        f"{machine}{threads}; {shape}.",
        f"{', '.join(packages)}; {session['started']}{commit}.",
    ]
    if bench.ceilings is not None:
        line = ceilings_line(bench.ceilings)
        lines.append(f"{line[0].upper()}{line[1:]}.")
    load = session.get("load_average")
    if load and options["device"] == "cpu":
        cores = session["machine_cores"]
        lines.append(f"Load average when it began: {load[0]:.1f}, on {cores} cores.")
    if not bench.complete:
        lines.append("**This run was interrupted: what it had measured by then.**")
    return lines


def _table(bench: Bench, cells: Sequence[Cell]) -> str:
    lines = [list(COLUMNS), ["---", "---"] + ["---:"] * (len(COLUMNS) - 2)]
    for cell in cells:
        lines.append([_cell(cell.label), _cell(_backend(cell)), *_figures(bench, cell)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures(bench: Bench, cell: Cell) -> list[str]:
    median, quartiles, found = cell.median_ms, cell.quartiles_ms, bench.rates(cell)
    error = "-" if cell.gate_error is None else f"{cell.gate_error:.1e}"
    memory = "-" if cell.memory_ratio is None else f"{cell.memory_ratio:.2f}"
    if median is None or quartiles is None or found is None:
        return [_cell(f"{cell.status}: {cell.reason}"), *["-"] * 6, memory, error]
    return [
        number(median),
        f"{number(quartiles[0])} to {number(quartiles[1])}",
        str(len(cell.samples_ms)),
        _speedup(found),
        f"{number(found.tflop_per_s)} ({found.matmul_share:.0%})",
        f"{number(found.gb_per_s)} ({found.copy_share:.0%})",
        number(found.gap),
        memory,
        error,
    ]


def _speedup(found: Rates) -> str:
    if found.speedup is None or found.speedup_quartiles is None:
        return "-"
    low, high = found.speedup_quartiles
    return f"{number(found.speedup)} ({number(low)} to {number(high)})"


def _summary(bench: Bench, cell: Cell) -> str:
    if cell.status != TIMED or cell.median_ms is None:
        return "WRONG" if cell.status == WRONG else cell.status.replace(" ", "-")
    found = bench.rates(cell)
    if found is None or found.speedup is None or cell.label == BASELINE:
        return number(cell.median_ms)
    return f"{number(cell.median_ms)} {number(found.speedup)}x"


def _backend(cell: Cell) -> str:
    return f"{cell.backend} {AUTO}" if cell.automatic else cell.backend


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
