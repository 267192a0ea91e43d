"""A benchmark as text: a Markdown table for each length, and a summary for the terminal."""

from __future__ import annotations

import math
import statistics
from typing import Any

from sa_patch.benchmark.attention.candidates import BASELINE
from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell, paired_ratios
from sa_patch.benchmark.clock import Ceilings
from sa_patch.benchmark.record import TIMED, WRONG, machine, packages
from sa_patch.benchmark.tables import number, ordered, spread, table

AUTO = "*"
COLUMNS = (
    "what | backend | >ms | >quartiles | >times | >x SDPA full | >TFLOP/s | >GB/s | >x floor "
    "| >memory | >error"
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


def ceilings_line(ceilings: Ceilings) -> str:
    """The machine's ceilings in one line."""
    return (
        f"ceilings: copy {number(ceilings.copy_gb_per_s)} GB/s (read and written, "
        f"{ceilings.copy_bytes >> 20} MiB), matrix product {number(ceilings.matmul_tflop_per_s)} "
        f"TFLOP/s (side {ceilings.matmul_size}); best of {len(ceilings.copy_ms)}"
    )


def cell_line(bench: AttentionBench, cell: AttentionCell) -> str:
    """One finished cell in one line."""
    name = f"  {cell.label:30s} {_backend(cell):14s}"
    median, quartiles, found = cell.median_ms, cell.quartiles_ms, bench.rates(cell)
    if median is None or quartiles is None:
        return f"{name} {cell.status}: {cell.reason}"
    speed = (
        "" if found is None or found.speedup is None else f"  {number(found.speedup)}x SDPA full"
    )
    between = f"({spread(*quartiles)}, {len(cell.samples_ms)} times)"
    return f"{name} {number(median):>8s} ms {between:32s}{speed}"


def markdown(bench: AttentionBench, title: str = "Attention benchmark") -> str:
    """The whole run as Markdown."""
    parts = [f"# {title}", *_heading(bench)]
    if wrong := [cell for cell in bench.cells if cell.status == WRONG]:
        names = ", ".join(f"{c.label} on {c.backend} at n = {c.n}" for c in wrong)
        parts.append(f"**Wrong results, not timed:** {names}")
    for n in bench.lengths():
        cells = ordered(bench.at(n))
        rows = ([cell.label, _backend(cell), *_figures(bench, cell)] for cell in cells)
        parts += [f"## n = {n:,}", table(COLUMNS, rows)]
    if bench.not_served:
        refused = ((one.label, one.backend, one.reason) for one in bench.not_served)
        parts += ["## Not measured", table("what | backend | why", refused)]
    return "\n\n".join([*parts, "## How to read it", NOTES]) + "\n"


def print_summary(bench: AttentionBench, console: Any) -> None:
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


def summary_rows(bench: AttentionBench) -> list[tuple[str, str, list[str]]]:
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


def ratio_table(bench: AttentionBench, base: str = "reference") -> str:
    """Each backend's time over that of `base` for the same pattern, call by call, as Markdown.

    Medians of `paired_ratios`; a dash where either was not timed; rivals are left out.
    """
    own = [cell for cell in bench.cells if not cell.rival]
    names = [name for name in dict.fromkeys(cell.backend for cell in own) if name != base]
    rows = []
    for n, label in sorted(dict.fromkeys((c.n, c.label) for c in own), key=lambda key: key[0]):
        timed = {c.backend: c for c in own if (c.n, c.label, c.status) == (n, label, TIMED)}
        texts = [
            number(statistics.median(paired_ratios(timed[name], timed[base])))
            if name in timed and base in timed
            else "-"
            for name in names
        ]
        rows.append([f"{n:,}", label, *texts])
    return table(" | ".join([">n", "pattern", *(f">{name} / {base}" for name in names)]), rows)


def machine_line(bench: AttentionBench) -> str:
    """The GPU's name, or the processor's and how many threads there were."""
    threads = bench.options["threads"] or bench.provenance["hardware"]["torch_threads"]
    return machine(bench.provenance, bench.options["device"], threads)


def shape_line(bench: AttentionBench) -> str:
    """Heads, width, batch and dtype."""
    options = bench.options
    return (
        f"{options['heads']} query and {options['kv_heads']} KV heads of {options['head_dim']}, "
        f"batch {options['batch']}, {options['dtype']}"
    )


def _heading(bench: AttentionBench) -> list[str]:
    session, commit = bench.provenance, ""
    if git := session.get("git"):
        commit = f", commit {git['commit'][:12]}{' (changed)' if git['dirty'] else ''}"
    lines = [
        f"{machine_line(bench)}; {shape_line(bench)}.",
        f"{packages(session)}; {session['started']}{commit}.",
    ]
    if bench.ceilings is not None:
        line = ceilings_line(bench.ceilings)
        lines.append(f"{line[0].upper()}{line[1:]}.")
    load = session.get("load_average")
    if load and bench.options["device"] == "cpu":
        cores = session["machine_cores"]
        lines.append(f"Load average when it began: {load[0]:.1f}, on {cores} cores.")
    if not bench.complete:
        lines.append("**This run was interrupted: what it had measured by then.**")
    return lines


def _figures(bench: AttentionBench, cell: AttentionCell) -> list[str]:
    median, quartiles, found = cell.median_ms, cell.quartiles_ms, bench.rates(cell)
    checked = cell.correctness
    memory = "-" if cell.memory_ratio is None else f"{cell.memory_ratio:.2f}"
    error = "-" if checked is None or not math.isfinite(checked.error) else f"{checked.error:.1e}"
    if median is None or quartiles is None or found is None:
        return [f"{cell.status}: {cell.reason}", *["-"] * 6, memory, error]
    speedup = "-"
    if found.speedup is not None and found.speedup_quartiles is not None:
        speedup = f"{number(found.speedup)} ({spread(*found.speedup_quartiles)})"
    return [
        number(median),
        spread(*quartiles),
        str(len(cell.samples_ms)),
        speedup,
        f"{number(found.tflop_per_s)} ({found.matmul_share:.0%})",
        f"{number(found.gb_per_s)} ({found.copy_share:.0%})",
        number(found.gap),
        memory,
        error,
    ]


def _summary(bench: AttentionBench, cell: AttentionCell) -> str:
    if cell.status != TIMED or cell.median_ms is None:
        return "WRONG" if cell.status == WRONG else cell.status.replace(" ", "-")
    found = bench.rates(cell)
    if found is None or found.speedup is None or cell.label == BASELINE:
        return number(cell.median_ms)
    return f"{number(cell.median_ms)} {number(found.speedup)}x"


def _backend(cell: AttentionCell) -> str:
    return f"{cell.backend} {AUTO}" if cell.automatic else cell.backend
