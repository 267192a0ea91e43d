"""The GPU goal sheet: correctness, the table and the goals, within a time limit, offline.

Needs torch and the kernels' own packages only; rich and matplotlib are used where they are
installed. Everything measured so far is on disk whenever it is stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_patch.benchmark.attention.correctness_grid import (
    FAILED,
    WRONG,
    Case,
    Checked,
    grid,
    run_checks,
    tally,
)
from sa_patch.benchmark.attention.goals import BLOCK_MOBA, UNMEASURED, WINDOW, Goal, judge_goals
from sa_patch.benchmark.attention.options import BenchOptions, make_options, prepare_folder
from sa_patch.benchmark.attention.record import Bench
from sa_patch.benchmark.attention.run import Console, PlainConsole, provenance, run_bench
from sa_patch.benchmark.attention.tables import markdown
from sa_patch.benchmark.goal_lines import goal_lines, goals_markdown
from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole
from sa_patch.kernels import BACKENDS

BUDGET = 540.0
# Shares of what is left when each part begins; what a part leaves over goes to the later ones.
FIRST_CHECKS, TABLE, MORE_CHECKS = 0.25, 0.7, 0.4
WORTH_STARTING = 20.0  # seconds left below which no further table is begun
KERNELS = ("triton", "flash", "banded", "reference", "flex")  # flex compiles for long
SMALL_WINDOW = 32
REHEARSAL = "a rehearsal on a CPU: no result of a GPU"


@dataclass
class Sheet:
    """The goal sheet as it grows.

    Args:
        rehearsal: whether this ran on a CPU, where no goal can be judged.
        planned: cases of the correctness grid.
        benches: the tables measured, by the stem of their files.
    """

    provenance: dict[str, Any]
    rehearsal: bool
    planned: int
    checks: list[Checked] = field(default_factory=list)
    benches: dict[str, Bench] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)

    def wrong(self) -> list[str]:
        """Everything that gave a wrong result or failed, in words."""
        bad = [f"{c.status}: {c.case}: {c.reason}" for c in self.checks if c.status in BAD]
        for bench in self.benches.values():
            bad += [
                f"{c.status}: {c.label} on {c.backend}, n = {c.n}: {c.reason}"
                for c in bench.cells
                if c.status in BAD
            ]
        return bad


BAD = (WRONG, FAILED)


def run_goal_sheet(
    out: Path,
    *,
    device: str = "cuda",
    small: bool = False,
    budget: float = BUDGET,
    console: Console | None = None,
) -> int:
    """Check, measure, judge, and write ``goals.json``, ``goals.md`` and the tables into `out`.

    Args:
        device: "cuda"; "cpu" only rehearses the whole path, which `small` makes quick.
        small: tiny lengths.
        budget: seconds for everything.

    Returns:
        1 where a backend was wrong or failed, else 0; goals that were missed are findings.

    Raises:
        UserError: if there is no CUDA device, or the folder cannot be written.
    """
    console = console or PlainConsole()
    deadline = time.monotonic() + budget
    main = _table_options(out, device, small)
    prepare_folder(out)
    cases = grid(_order(BACKENDS), small=small)
    sheet = Sheet(provenance(sys.argv), device == "cpu", len(cases))
    waiting = iter(cases)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if sheet.rehearsal:
        say(f"This is {REHEARSAL}.")
    try:
        say(f"{_machine(sheet)}; checking the backends, {len(cases)} cases")
        _check(sheet, waiting, out, device, deadline, FIRST_CHECKS, console)
        _measure(sheet, "attention", main, TABLE, deadline, console)
        sheet.goals = _judged(sheet, SMALL_WINDOW if small else WINDOW)
        _write(sheet, out)
        _check(sheet, waiting, out, device, deadline, MORE_CHECKS, console)
        for index, (stem, options) in enumerate(extra := _extra_options(main, small)):
            if deadline - time.monotonic() > WORTH_STARTING:
                share = 1 / (len(extra) - index)
                _measure(sheet, stem, options, share, deadline, console)
                _write(sheet, out)
    finally:
        _write(sheet, out)
    for line in goal_lines(sheet.goals):
        say(line)
    if bad := sheet.wrong():
        say(f"{len(bad)} wrong or failed, above and in {out / 'goals.md'}")
    return int(bool(bad))


def _order(backends: Iterable[str]) -> list[str]:
    """Our own kernels first: they are what the sheet is for."""
    return sorted(backends, key=lambda name: KERNELS.index(name) if name in KERNELS else -1)


def _table_options(out: Path, device: str, small: bool) -> BenchOptions:
    window = SMALL_WINDOW if small else WINDOW
    methods = (f"sa:window={window}", f"swa:window={window}", f"moba:window={window}")
    given: dict[str, Any] = {"methods": (*methods, str(BLOCK_MOBA), "full"), "window": window}
    if small:
        given |= {"n": (256, 512, 1024), "heads": 8, "kv_heads": 2, "head_dim": 64, "repeats": 3}
    options = make_options(device=device, out=out, **given)
    # A dense mask has no place in a race at 128K; the grid checks it like the others.
    quick = tuple(name for name in options.backends if name != "reference")
    return dataclasses.replace(options, backends=quick)


def _extra_options(main: BenchOptions, small: bool) -> list[tuple[str, BenchOptions]]:
    """Other windows, then Qwen3-30B-A3B's shape."""
    methods = ("sa", "swa", "moba", "full")
    windows = dataclasses.replace(main, methods=methods, window=(64, 1024))
    if small:
        return [("windows", dataclasses.replace(windows, window=(64,), n=(512,)))]
    return [("windows", windows), ("qwen3-30b-a3b", dataclasses.replace(main, kv_heads=4))]


def _check(
    sheet: Sheet,
    waiting: Iterator[Case],
    out: Path,
    device: str,
    deadline: float,
    share: float,
    console: Console,
) -> None:
    until = time.monotonic() + share * (deadline - time.monotonic())
    sheet.checks += run_checks(
        waiting, device, until, lambda line: console.print(line, highlight=False, markup=False)
    )
    console.print(f"{len(sheet.checks)} of {sheet.planned} cases: {_tally_text(sheet)}")
    _write(sheet, out)


def _measure(
    sheet: Sheet,
    stem: str,
    options: BenchOptions,
    share: float,
    deadline: float,
    console: Console,
) -> None:
    seconds = max(1.0, share * (deadline - time.monotonic()))
    limited = dataclasses.replace(options, budget=seconds)
    first = stem == "attention"
    outcome = run_bench(
        limited, console, stem=stem, json_only=not first, small_ceilings=sheet.rehearsal
    )
    sheet.benches[stem] = outcome.bench


def _judged(sheet: Sheet, window: int) -> list[Goal]:
    goals = judge_goals(sheet.benches["attention"], window)
    if not sheet.rehearsal:
        return goals
    return [dataclasses.replace(g, value=None, status=UNMEASURED, detail=REHEARSAL) for g in goals]


def _write(sheet: Sheet, out: Path) -> None:
    content = {
        "kind": "sa_patch GPU goal sheet",
        "schema": 1,
        "rehearsal": sheet.rehearsal,
        "provenance": sheet.provenance,
        "goals": [dataclasses.asdict(goal) for goal in sheet.goals],
        "checks_planned": sheet.planned,
        "checks": [
            {"case": str(one.case)}
            | {key: getattr(one, key) for key in ("status", "error", "tolerance", "reason")}
            for one in sheet.checks
        ],
        "tables": [f"{stem}.json" for stem in sheet.benches],
    }
    try:
        write_whole(out / "goals.json", (json.dumps(content, indent=1) + "\n").encode())
        write_whole(out / "goals.md", _markdown(sheet).encode())
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error


def _markdown(sheet: Sheet) -> str:
    parts = ["# GPU goal sheet", _machine(sheet) + "."]
    if sheet.rehearsal:
        parts.append(f"**This is {REHEARSAL}.**")
    parts += ["## Goals", goals_markdown(sheet.goals) if sheet.goals else "Not reached."]
    parts += [
        "## Correctness",
        f"{len(sheet.checks)} of {sheet.planned} cases of the grid were reached: "
        f"{_tally_text(sheet)}.",
    ]
    bad = sheet.wrong()
    parts.append("\n".join(f"- {line}" for line in bad) if bad else "Nothing was wrong.")
    for stem, bench in sheet.benches.items():
        if stem != "attention":
            parts.append(markdown(bench).replace("# Attention benchmark", f"# {stem}", 1))
    return "\n\n".join(parts) + "\n"


def _tally_text(sheet: Sheet) -> str:
    return "; ".join(
        f"{backend} " + ", ".join(f"{count} {status}" for status, count in counts.items())
        for backend, counts in tally(sheet.checks).items()
    )


def _machine(sheet: Sheet) -> str:
    hardware, versions = sheet.provenance["hardware"], sheet.provenance["versions"]
    name = hardware["cpu"] if sheet.rehearsal else hardware["gpus"][0]
    kernels = [f"{key} {found}" for key, found in versions.items() if found and "fla" in key]
    packages = [f"torch {versions['torch']}", f"triton {versions.get('triton')}", *kernels]
    return f"{name}; {', '.join(packages)}"
