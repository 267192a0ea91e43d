"""The GPU goal sheet: correctness, the table and the goals, within a time limit, offline.

Needs torch and the kernels' own packages only; matplotlib is used where it is installed. Everything
measured so far is on disk whenever it is stopped.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_patch.benchmark.attention.correctness_grid import Checked, grid, run_checks, tally
from sa_patch.benchmark.attention.goals import BLOCK_MOBA, WINDOW, judge_goals
from sa_patch.benchmark.attention.options import AttentionOptions, make_options
from sa_patch.benchmark.attention.record import AttentionBench
from sa_patch.benchmark.attention.run import run_bench
from sa_patch.benchmark.attention.tables import markdown
from sa_patch.benchmark.goals import Goal, goal_lines, goals_markdown, unmeasured
from sa_patch.benchmark.record import (
    FAILED,
    WRONG,
    machine,
    packages,
    provenance,
    write_results,
)
from sa_patch.benchmark.tables import Say, bullets, say_line
from sa_patch.files.artifacts import check_folder
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
        device: "cuda", or "cpu" for a rehearsal, in which no goal can be judged.
        planned: cases of the correctness grid.
        benches: the tables measured, by the stem of their files.
    """

    provenance: dict[str, Any]
    device: str
    planned: int
    checks: list[Checked] = field(default_factory=list)
    benches: dict[str, AttentionBench] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def machine(self) -> str:
        """The machine, and the versions of torch and of the kernels' packages."""
        return f"{machine(self.provenance, self.device)}; {packages(self.provenance)}"

    @property
    def tally(self) -> str:
        """How many cases of each backend passed, and how many did not."""
        return "; ".join(
            f"{backend} " + ", ".join(f"{count} {status}" for status, count in counts.items())
            for backend, counts in tally(self.checks).items()
        )

    def wrong(self) -> list[str]:
        """Everything that gave a wrong result or failed, in words."""
        bad = [c for c in self.checks if c.status in (WRONG, FAILED)]
        found = [f"{c.status}: {c.case}: {c.reason}" for c in bad]
        return found + [line for bench in self.benches.values() for line in bench.wrong()]

    def write(self, out: Path) -> None:
        """Write ``goals.json`` and ``goals.md``."""
        content = {
            "kind": "sa_patch GPU goal sheet",
            "schema": 1,
            "rehearsal": self.rehearsal,
            "provenance": self.provenance,
            "goals": [dataclasses.asdict(goal) for goal in self.goals],
            "checks_planned": self.planned,
            "checks": [
                {"case": str(one.case)}
                | {key: getattr(one, key) for key in ("status", "error", "tolerance", "reason")}
                for one in self.checks
            ],
            "tables": [f"{stem}.json" for stem in self.benches],
        }
        write_results(out / "goals", content, self._markdown())

    def _markdown(self) -> str:
        parts = ["# GPU goal sheet", f"{self.machine}."]
        if self.rehearsal:
            parts.append(f"**This is {REHEARSAL}.**")
        parts += [
            "## Goals",
            goals_markdown(self.goals) if self.goals else "Not reached.",
            "## Correctness",
            f"{len(self.checks)} of {self.planned} cases of the grid were reached: {self.tally}.",
            bullets(self.wrong()) or "Nothing was wrong.",
        ]
        extra = [(stem, bench) for stem, bench in self.benches.items() if stem != "attention"]
        return "\n\n".join([*parts, *(markdown(bench, stem) for stem, bench in extra)]) + "\n"


def run_goal_sheet(
    out: Path,
    *,
    device: str = "cuda",
    small: bool = False,
    budget: float = BUDGET,
    say: Say = say_line,
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
    deadline = time.monotonic() + budget
    main = _table_options(out, device, small)
    check_folder(out)
    cases = grid(_order(BACKENDS), small=small)
    sheet = Sheet(provenance(sys.argv), device, len(cases))
    waiting = iter(cases)

    def check(share: float) -> None:
        until = time.monotonic() + share * (deadline - time.monotonic())
        sheet.checks += run_checks(waiting, device, until, say)
        say(f"{len(sheet.checks)} of {sheet.planned} cases: {sheet.tally}")
        sheet.write(out)

    def measure(stem: str, options: AttentionOptions, share: float) -> None:
        seconds = max(1.0, share * (deadline - time.monotonic()))
        sheet.benches[stem] = run_bench(
            dataclasses.replace(options, budget=seconds),
            say,
            stem=stem,
            json_only=stem != "attention",
            small_ceilings=sheet.rehearsal,
        ).bench

    if sheet.rehearsal:
        say(f"This is {REHEARSAL}.")
    try:
        say(f"{sheet.machine}; checking the backends, {len(cases)} cases")
        check(FIRST_CHECKS)
        measure("attention", main, TABLE)
        goals = judge_goals(sheet.benches["attention"], SMALL_WINDOW if small else WINDOW)
        rehearsed = [unmeasured(goal.name, goal.target, REHEARSAL) for goal in goals]
        sheet.goals = rehearsed if sheet.rehearsal else goals
        sheet.write(out)
        check(MORE_CHECKS)
        for index, (stem, options) in enumerate(extra := _extra_options(main, small)):
            if deadline - time.monotonic() > WORTH_STARTING:
                measure(stem, options, 1 / (len(extra) - index))
                sheet.write(out)
    finally:
        sheet.write(out)
    for line in goal_lines(sheet.goals):
        say(line)
    if bad := sheet.wrong():
        say(f"{len(bad)} wrong or failed, above and in {out / 'goals.md'}")
    return int(bool(bad))


def _order(backends: Iterable[str]) -> list[str]:
    """Our own kernels first: they are what the sheet is for."""
    return sorted(backends, key=lambda name: KERNELS.index(name) if name in KERNELS else -1)


def _table_options(out: Path, device: str, small: bool) -> AttentionOptions:
    window = SMALL_WINDOW if small else WINDOW
    methods = (f"sa:window={window}", f"swa:window={window}", f"moba:window={window}")
    given: dict[str, Any] = {"methods": (*methods, str(BLOCK_MOBA), "full"), "window": window}
    if small:
        given |= {"n": (256, 512, 1024), "heads": 8, "kv_heads": 2, "head_dim": 64, "repeats": 3}
    options = make_options(device=device, out=out, **given)
    # A dense mask has no place in a race at 128K; the grid checks it like the others.
    quick = tuple(name for name in options.backends if name != "reference")
    return dataclasses.replace(options, backends=quick)


def _extra_options(main: AttentionOptions, small: bool) -> list[tuple[str, AttentionOptions]]:
    """Other windows, then Qwen3-30B-A3B's shape."""
    methods = ("sa", "swa", "moba", "full")
    windows = dataclasses.replace(main, methods=methods, window=(64, 1024))
    if small:
        return [("windows", dataclasses.replace(windows, window=(64,), n=(512,)))]
    return [("windows", windows), ("qwen3-30b-a3b", dataclasses.replace(main, kv_heads=4))]
