"""Benchmark of attention: every method on every backend beside its rivals, in one run.

No time is given before the same call has passed its check against a float64 oracle. Every call gets
a fresh layer: stochastic attention's permutation and plan are part of its time, as they are in a
model. Where a backend plans several layers at once, a layer's share is timed apart and added.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa_patch.benchmark.attention.measure import AttentionMeasurer
from sa_patch.benchmark.attention.options import AttentionOptions
from sa_patch.benchmark.attention.record import AttentionBench
from sa_patch.benchmark.attention.tables import ceilings_line, cell_line, markdown, summary
from sa_patch.benchmark.clock import Clock, better, measure_ceilings, quiet_process
from sa_patch.benchmark.record import provenance, write_results
from sa_patch.benchmark.tables import Say, say_line
from sa_patch.benchmark.time_plan import length_share
from sa_patch.files.artifacts import check_folder
from sa_patch.files.provenance import now


@dataclass(frozen=True)
class BenchOutcome:
    """A finished run.

    Args:
        bench: what was measured.
        files: what was written, the JSON first.
        exit_status: 1 where a result was wrong or a call failed, else 0.
    """

    bench: AttentionBench
    files: tuple[Path, ...]
    exit_status: int


def run_bench(
    options: AttentionOptions,
    say: Say = say_line,
    *,
    command: Sequence[str] = (),
    json_only: bool = False,
    small_ceilings: bool = False,
    resumed: AttentionBench | None = None,
) -> BenchOutcome:
    """Measure, print and write ``attention.json``, ``.md`` and ``.png`` into `options.out`.

    The JSON is rewritten after each length, and an interrupt keeps what was measured.

    Args:
        say: takes a line of progress or of results.
        command: the command line, for the provenance.
        json_only: write no Markdown and no figure.
        resumed: what an earlier run measured and this one need not measure again.
        small_ceilings: measure the ceilings on tiny arrays, where no rate will be believed.

    Raises:
        UserError: if the folder cannot be written.
        KeyboardInterrupt: passed on once everything is on disk.
    """
    check_folder(options.out)
    with quiet_process(options.threads):
        bench = resumed or AttentionBench({}, {})
        bench.resume()
        bench.provenance, bench.options = provenance(command or sys.argv), options.described()
        clock = Clock(options.device)
        deadline = time.monotonic() + options.budget
        measurer = AttentionMeasurer(options, bench, clock, deadline, say)
        try:
            ceilings = measure_ceilings(clock, options.torch_dtype, small=small_ceilings)
            bench.ceilings = ceilings
            say(ceilings_line(ceilings))
            lengths = options.order or options.n
            for index, n in enumerate(lengths):
                measurer.measure(n, length_share(n, lengths[index:]))
                for cell in bench.where(n=n):
                    say(cell_line(bench, cell))
                write(options.out / "attention", bench, json_only=json_only, figure=False)
            again = measure_ceilings(clock, options.torch_dtype, small=small_ceilings)
            bench.ceilings = better(ceilings, again)
            bench.complete = True
        finally:
            bench.provenance["ended"] = now()
            files = write(options.out / "attention", bench, json_only=json_only)
    for line in summary(bench):
        say(line)
    return BenchOutcome(bench, files, int(bool(bench.wrong())))


def write(
    stem: Path, bench: AttentionBench, *, json_only: bool = False, figure: bool = True
) -> tuple[Path, ...]:
    """Write a run's files; the figure only where matplotlib is installed and there is a time.

    Raises:
        UserError: if the folder cannot be written.
    """

    def draw() -> bytes:
        from sa_patch.benchmark.attention.figure import figure_bytes

        return figure_bytes(bench)

    if json_only:
        return write_results(stem, bench.content())
    wanted = figure and any(cell.samples_ms for cell in bench.cells)
    return write_results(stem, bench.content(), markdown(bench), draw if wanted else None)
