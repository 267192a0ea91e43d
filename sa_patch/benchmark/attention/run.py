"""Benchmark of attention: every method on every backend beside its rivals, in one run.

No time is given before the same call has passed its check against a float64 oracle. Cells of one
length are timed in turn and in random order, so that a machine that drifts hits them alike. Every
call gets a fresh layer: stochastic attention's permutation and plan are part of its time, as they
are in a model.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sa_patch.benchmark.attention.length import Runner
from sa_patch.benchmark.attention.options import BenchOptions, prepare_folder
from sa_patch.benchmark.attention.record import FAILED, WRONG, Bench, write_bench
from sa_patch.benchmark.attention.tables import ceilings_line, cell_line, markdown, print_summary
from sa_patch.benchmark.attention.time_plan import length_share
from sa_patch.benchmark.clock import Clock, better, measure_ceilings, quiet_process
from sa_patch.benchmark.optional_figure import drawn
from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole
from sa_patch.files.provenance import describe_session, now

KERNEL_PACKAGES = ("triton", "flash-attn", "flash-attn-3", "fa3-fwd", "flash-attn-4")


class Console(Protocol):
    """What is needed of rich's console, so that a machine without rich can do."""

    def print(self, *objects: Any, **style: Any) -> None: ...


class PlainConsole:
    """Prints without rich."""

    def print(self, *objects: Any, **style: Any) -> None:
        print(*objects, flush=True)


@dataclass(frozen=True)
class BenchOutcome:
    """A finished run.

    Args:
        bench: what was measured.
        files: what was written, the JSON first.
        exit_status: 1 where a result was wrong or a call failed, else 0.
    """

    bench: Bench
    files: tuple[Path, ...]
    exit_status: int


def run_bench(
    options: BenchOptions,
    console: Console | None = None,
    *,
    command: Sequence[str] = (),
    stem: str = "attention",
    json_only: bool = False,
    small_ceilings: bool = False,
) -> BenchOutcome:
    """Measure, print and write ``attention.json``, ``.md`` and ``.png`` into `options.out`.

    The JSON is rewritten after each length, and an interrupt keeps what was measured.

    Args:
        console: rich's console or one like it; standard output by default.
        command: the command line, for the provenance.
        stem: of the files' names.
        json_only: write no Markdown and no figure.
        small_ceilings: measure the ceilings on tiny arrays, where no rate will be believed.

    Raises:
        UserError: if the folder cannot be written.
        KeyboardInterrupt: passed on once everything is on disk.
    """
    console = console or PlainConsole()
    prepare_folder(options.out)
    with quiet_process(options.threads):
        bench = Bench(provenance(command or sys.argv), options.described())
        clock = Clock(options.device)
        deadline = time.monotonic() + options.budget
        runner = Runner(options, bench, clock, deadline, lambda line: _say(console, line))
        try:
            ceilings = measure_ceilings(clock, options.torch_dtype, small=small_ceilings)
            bench.ceilings = ceilings
            _say(console, ceilings_line(bench.ceilings))
            for index, n in enumerate(options.n):
                runner.measure(n, length_share(n, options.n[index:]))
                _print_length(bench, n, console)
                write_results(options.out, bench, stem, markdown_too=not json_only, figure=False)
            again = measure_ceilings(clock, options.torch_dtype, small=small_ceilings)
            bench.ceilings = better(ceilings, again)
            bench.complete = True
        finally:
            bench.provenance["ended"] = now()
            more = not json_only
            files = write_results(options.out, bench, stem, markdown_too=more, figure=more)
    print_summary(bench, console)
    failed = any(cell.status in (WRONG, FAILED) for cell in bench.cells)
    return BenchOutcome(bench, files, int(failed))


def write_results(
    folder: Path, bench: Bench, stem: str, *, markdown_too: bool, figure: bool
) -> tuple[Path, ...]:
    """Write a run's files; the figure only where matplotlib is installed and there is a time.

    Raises:
        UserError: if the folder cannot be written.
    """
    files = [folder / f"{stem}.json"]
    try:
        write_bench(files[0], bench)
        if markdown_too:
            files.append(folder / f"{stem}.md")
            write_whole(files[-1], markdown(bench).encode())
        image = _figure(bench) if figure else None
        if image is not None:
            files.append(folder / f"{stem}.png")
            write_whole(files[-1], image)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    return tuple(files)


def _figure(bench: Bench) -> bytes | None:
    if not any(cell.samples_ms for cell in bench.cells):
        return None

    def draw() -> bytes:
        from sa_patch.benchmark.attention.figure import figure_bytes

        return figure_bytes(bench)

    return drawn(draw)


def _print_length(bench: Bench, n: int, console: Console) -> None:
    for cell in bench.at(n):
        console.print(cell_line(bench, cell), highlight=False, markup=False, soft_wrap=True)


def _say(console: Console, line: str) -> None:
    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """`describe_session`, with the versions of kernel packages and the load of the machine."""
    session = describe_session(command)
    for name in KERNEL_PACKAGES:
        try:
            session["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            session["versions"][name] = None
    session["machine_cores"] = os.cpu_count()
    session["load_average"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    return session
