"""What a benchmark found, as data: cells with every sample, and the figures that follow."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_patch.benchmark.attention.candidates import NotServed
from sa_patch.benchmark.clock import Ceilings
from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole

SCHEMA = 1
KIND = "sa_patch attention benchmark"
TIMED, WRONG, SKIPPED, OUT_OF_MEMORY, FAILED = (
    "timed",
    "wrong",
    "skipped",
    "out of memory",
    "failed",
)
STATUSES = (TIMED, WRONG, SKIPPED, OUT_OF_MEMORY, FAILED)


@dataclass
class Cell:
    """One contestant at one length.

    Args:
        n: tokens of each sequence.
        label, method, backend, rival: as in `Candidate`.
        window: keys in view by name; None where unlimited.
        automatic: whether `auto` takes this backend here.
        status: one of `STATUSES`; a time is only given where it is "timed".
        reason: why it was not timed.
        gate_error, gate_tolerance, gate_rows, gate_undecided: of the correctness check.
        mean_keys: keys per query, mean over the sequence.
        flops: that the pattern really needs for the whole batch: 4 head_dim for each visible
            pair and query head, 2 head_dim for each dot product spent on choosing keys.
        io_bytes: q, k, v read once and the result written once.
        extra_bytes: peak of memory beside inputs and result; None if not measured.
        samples_ms: every timed call.
        started_s: when each of them began, in seconds since the run did.
    """

    n: int
    label: str
    method: str
    backend: str
    rival: bool
    window: int | None
    automatic: bool = False
    status: str = SKIPPED
    reason: str = ""
    gate_error: float | None = None
    gate_tolerance: float | None = None
    gate_rows: int = 0
    gate_undecided: int = 0
    mean_keys: float = 0.0
    flops: float = 0.0
    io_bytes: int = 0
    extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.status == TIMED else None

    @property
    def quartiles_ms(self) -> tuple[float, float] | None:
        """The first and third quartile; the extremes of fewer than four samples."""
        if self.status != TIMED:
            return None
        return quartiles(self.samples_ms)

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory, inputs and result counted, over inputs and result alone."""
        if self.extra_bytes is None:
            return None
        return (self.io_bytes + self.extra_bytes) / self.io_bytes


@dataclass(frozen=True)
class Rates:
    """A timed cell against the machine's ceilings.

    Args:
        speedup: time of SDPA full at the same n over this one, call by call (`paired_ratios`);
            the median. None where SDPA full was not timed.
        speedup_quartiles: the first and third quartile of these ratios.
        tflop_per_s, matmul_share: needed FLOPs over the time, and its share of the ceiling.
        gb_per_s, copy_share: fewest bytes over the time, and its share of the ceiling.
        floor_ms: the time at which the nearer ceiling would be met.
        gap: time over floor.
    """

    speedup: float | None
    speedup_quartiles: tuple[float, float] | None
    tflop_per_s: float
    matmul_share: float
    gb_per_s: float
    copy_share: float
    floor_ms: float
    gap: float


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile; the extremes of fewer than four values."""
    if len(values) < 4:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def paired_ratios(base: Cell, cell: Cell) -> list[float]:
    """For each call of `cell`, the time of the call of `base` nearest to it in time over its own.

    A machine that slows down for a while slows both, so that the ratio stays.
    """
    return [
        base.samples_ms[min(range(len(base.started_s)), key=lambda i: abs(base.started_s[i] - at))]
        / ms
        for at, ms in zip(cell.started_s, cell.samples_ms, strict=True)
    ]


def rates(cell: Cell, baseline: Cell | None, ceilings: Ceilings) -> Rates | None:
    """The figures that follow from a cell's median; None for a cell without one."""
    median = cell.median_ms
    if median is None:
        return None
    timed = baseline is not None and baseline.status == TIMED
    ratios = paired_ratios(baseline, cell) if baseline is not None and timed else None
    tflops, gigabytes = cell.flops / median / 1e9, cell.io_bytes / median / 1e6
    floor = max(
        cell.flops / ceilings.matmul_tflop_per_s / 1e9,
        cell.io_bytes / ceilings.copy_gb_per_s / 1e6,
    )
    return Rates(
        speedup=None if ratios is None else statistics.median(ratios),
        speedup_quartiles=None if ratios is None else quartiles(ratios),
        tflop_per_s=tflops,
        matmul_share=tflops / ceilings.matmul_tflop_per_s,
        gb_per_s=gigabytes,
        copy_share=gigabytes / ceilings.copy_gb_per_s,
        floor_ms=floor,
        gap=median / floor,
    )


@dataclass
class Bench:
    """A whole run.

    Args:
        provenance: of `describe_session`, with the versions of kernel packages and the load.
        options: of `BenchOptions.described`.
        ceilings: None until they are measured.
        cells: in the order in which they were measured.
        not_served: methods that a backend refuses here.
        complete: whether every length was reached.
    """

    provenance: dict[str, Any]
    options: dict[str, Any]
    ceilings: Ceilings | None = None
    cells: list[Cell] = field(default_factory=list)
    not_served: list[NotServed] = field(default_factory=list)
    complete: bool = False

    def at(self, n: int) -> list[Cell]:
        return [cell for cell in self.cells if cell.n == n]

    def lengths(self) -> list[int]:
        return sorted({cell.n for cell in self.cells})

    def baseline(self, n: int) -> Cell | None:
        """SDPA's full attention at this length."""
        return next((c for c in self.at(n) if c.rival and c.backend == "torch"), None)

    def rates(self, cell: Cell) -> Rates | None:
        if self.ceilings is None:
            return None
        return rates(cell, self.baseline(cell.n), self.ceilings)

    def wrong(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == WRONG]


def write_bench(path: Path, bench: Bench) -> None:
    """Write a run as JSON, whole or not at all; what follows from the samples is written too."""
    cells = []
    for cell in bench.cells:
        found = bench.rates(cell)
        cells.append(
            dataclasses.asdict(cell)
            | {"median_ms": cell.median_ms, "quartiles_ms": cell.quartiles_ms}
            | {"memory_ratio": cell.memory_ratio}
            | {"rates": None if found is None else dataclasses.asdict(found)}
        )
    content = {
        "kind": KIND,
        "schema": SCHEMA,
        "complete": bench.complete,
        "provenance": bench.provenance,
        "options": bench.options,
        "ceilings": None if bench.ceilings is None else dataclasses.asdict(bench.ceilings),
        "not_served": [dataclasses.asdict(one) for one in bench.not_served],
        "cells": cells,
    }
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def read_bench(path: Path) -> Bench:
    """Read what `write_bench` wrote.

    Raises:
        UserError: if the file is missing, torn, or of another kind or schema.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as a benchmark: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{path} is no {KIND}")
    if content.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {content.get('schema')}; this version reads {SCHEMA}")
    names = [entry.name for entry in dataclasses.fields(Cell)]
    try:
        return Bench(
            provenance=content["provenance"],
            options=content["options"],
            ceilings=_ceilings(content["ceilings"]),
            cells=[Cell(**{name: one[name] for name in names}) for one in content["cells"]],
            not_served=[NotServed(**one) for one in content["not_served"]],
            complete=content["complete"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks a part of a benchmark: {error}") from error


def _ceilings(found: dict[str, Any] | None) -> Ceilings | None:
    if found is None:
        return None
    tuples = {name: tuple(found[name]) for name in ("copy_ms", "matmul_ms")}
    return Ceilings(**(found | tuples))
