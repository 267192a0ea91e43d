"""A benchmark as text: a Markdown table for each length, and a summary for the terminal."""

from __future__ import annotations

import math
import statistics

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
  permutation and planning its work are in the time. `triton` plans several layers at once: a
  layer's share is timed apart and added, but for earlier runs and where time was short.
- **x SDPA full**: time of `scaled_dot_product_attention(is_causal=True)` at this length over the
  cell's; above 1 is faster. Each call is compared with the call of SDPA nearest to it in time, so
  that a drift of the machine cancels; median and quartiles of these ratios. A run that goes on
  times SDPA anew.
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


def markdown(bench: AttentionBench) -> str:
    """The whole run as Markdown."""
    parts = ["# Attention benchmark", *_heading(bench)]
    if wrong := [cell for cell in bench.cells if cell.status == WRONG]:
        names = ", ".join(f"{c.label} on {c.backend} at n = {c.n}" for c in wrong)
        parts.append(f"**Wrong results, not timed:** {names}")
    for n in bench.lengths():
        cells = ordered(bench.where(n=n))
        rows = ([cell.label, _backend(cell), *_figures(bench, cell)] for cell in cells)
        parts += [f"## n = {n:,}", table(COLUMNS, rows)]
    if bench.not_served:
        refused = ((one.label, one.backend, one.reason) for one in bench.not_served)
        parts += ["## Not measured", table("what | backend | why", refused)]
    return "\n\n".join([*parts, "## How to read it", NOTES]) + "\n"


def summary(bench: AttentionBench) -> list[str]:
    """Medians and speed-ups as lines for a terminal, a column for each length."""
    rows = [["what", "backend", *(f"{n:,}" for n in bench.lengths())], *summary_rows(bench)]
    what, backend, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["median ms, and how many times faster than SDPA full"]
    for name, server, *texts in rows:
        figures = (f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))
        lines.append("  ".join([f"{name:{what}}", f"{server:{backend}}", *figures]))
    if any(cell.automatic for cell in bench.cells):
        lines.append(f"{AUTO} the backend that auto takes at some of these lengths")
    return lines


def summary_rows(bench: AttentionBench) -> list[list[str]]:
    """What, backend and one text for each length, in the order of the longest length."""
    contestants: dict[tuple[str, str], dict[int, AttentionCell]] = {}
    for n in reversed(bench.lengths()):
        for cell in ordered(bench.where(n=n)):
            contestants.setdefault((cell.label, cell.backend), {})[n] = cell
    rows = []
    for (label, backend), cells in contestants.items():
        automatic = any(cell.automatic for cell in cells.values())
        texts = [_summary(bench, cells[n]) if n in cells else "-" for n in bench.lengths()]
        rows.append([label, f"{backend} {AUTO}" if automatic else backend, *texts])
    return rows


def ratio_table(bench: AttentionBench, base: str = "reference") -> str:
    """Each backend's time over that of `base` for the same pattern, call by call, as Markdown.

    Medians of `paired_ratios`; a dash where they were not timed in one pass; rivals are left out.
    """
    own = [cell for cell in bench.cells if not cell.rival]
    names = [name for name in dict.fromkeys(cell.backend for cell in own) if name != base]
    rows = []
    for n, label in sorted(dict.fromkeys((c.n, c.label) for c in own), key=lambda key: key[0]):
        timed = {c.backend: c for c in own if (c.n, c.label, c.status) == (n, label, TIMED)}
        ratios = [
            paired_ratios(timed[name], timed[base]) if {name, base} <= set(timed) else []
            for name in names
        ]
        texts = [number(statistics.median(found)) if found else "-" for found in ratios]
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
