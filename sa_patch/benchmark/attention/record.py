"""What a benchmark of attention found, as data, and the figures that follow."""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_patch.benchmark.attention.candidates import NotServed
from sa_patch.benchmark.attention.correctness import Verdict
from sa_patch.benchmark.clock import Ceilings
from sa_patch.benchmark.output import read_content
from sa_patch.benchmark.record import FAILED, TIMED, WRONG, Cell, quartiles
from sa_patch.errors import UserError

SCHEMA = 1
KIND = "sa_patch attention benchmark"


@dataclass(kw_only=True)
class AttentionCell(Cell):
    """One contestant at one length.

    Args:
        method, rival: as in `Candidate`.
        window: keys in view by name; None where unlimited.
        automatic: whether `auto` takes this backend here.
        correctness: of the check against the oracle; None if it was not reached.
        mean_keys: keys per query, mean over the sequence.
        flops: that the pattern really needs for the whole batch: 4 head_dim for each visible
            pair and query head, 2 head_dim for each dot product spent on choosing keys.
        io_bytes: q, k, v read once and the result written once; `extra_bytes` is beside them.
    """

    method: str
    rival: bool
    window: int | None
    automatic: bool = False
    correctness: Verdict | None = None
    mean_keys: float = 0.0
    flops: float = 0.0
    io_bytes: int = 0

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


def paired_ratios(base: AttentionCell, cell: AttentionCell) -> list[float]:
    """For each call of `cell`, the time of the call of `base` nearest to it in time over its own.

    A machine that slows down for a while slows both, so that the ratio stays.
    """
    return [
        base.samples_ms[min(range(len(base.started_s)), key=lambda i: abs(base.started_s[i] - at))]
        / ms
        for at, ms in zip(cell.started_s, cell.samples_ms, strict=True)
    ]


def rates(cell: AttentionCell, baseline: AttentionCell | None, ceilings: Ceilings) -> Rates | None:
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
class AttentionBench:
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
    cells: list[AttentionCell] = field(default_factory=list)
    not_served: list[NotServed] = field(default_factory=list)
    complete: bool = False

    def at(self, n: int) -> list[AttentionCell]:
        return [cell for cell in self.cells if cell.n == n]

    def lengths(self) -> list[int]:
        return sorted({cell.n for cell in self.cells})

    def baseline(self, n: int) -> AttentionCell | None:
        """SDPA's full attention at this length."""
        return next((c for c in self.at(n) if c.rival and c.backend == "torch"), None)

    def rates(self, cell: AttentionCell) -> Rates | None:
        if self.ceilings is None:
            return None
        return rates(cell, self.baseline(cell.n), self.ceilings)

    def wrong(self) -> list[str]:
        """Everything that gave a wrong result or failed, in words."""
        return [
            f"{c.status}: {c.label} on {c.backend}, n = {c.n}: {c.reason}"
            for c in self.cells
            if c.status in (WRONG, FAILED)
        ]

    def content(self) -> dict[str, Any]:
        """The run as JSON values; what follows from the samples is among them."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "complete": self.complete,
            "provenance": self.provenance,
            "options": self.options,
            "ceilings": None if self.ceilings is None else dataclasses.asdict(self.ceilings),
            "not_served": [dataclasses.asdict(one) for one in self.not_served],
            "cells": [self._cell_content(cell) for cell in self.cells],
        }

    def _cell_content(self, cell: AttentionCell) -> dict[str, Any]:
        values, found, rates = dataclasses.asdict(cell), cell.correctness, self.rates(cell)
        del values["correctness"]
        return values | {
            "gate_error": found.error if found and math.isfinite(found.error) else None,
            "gate_tolerance": found.tolerance if found else None,
            "gate_rows": found.compared if found else 0,
            "gate_undecided": found.undecided if found else 0,
            "median_ms": cell.median_ms,
            "quartiles_ms": cell.quartiles_ms,
            "memory_ratio": cell.memory_ratio,
            "rates": None if rates is None else dataclasses.asdict(rates),
        }


def read_bench(path: Path) -> AttentionBench:
    """Read a run from its JSON.

    Raises:
        UserError: if the file is missing, torn, or of another kind or schema.
    """
    content = read_content(path, KIND, SCHEMA)
    try:
        return AttentionBench(
            provenance=content["provenance"],
            options=content["options"],
            ceilings=_read_ceilings(content["ceilings"]),
            cells=[_read_cell(one) for one in content["cells"]],
            not_served=[NotServed(**one) for one in content["not_served"]],
            complete=content["complete"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks a part of a benchmark: {error}") from error


def _read_cell(found: dict[str, Any]) -> AttentionCell:
    names = {entry.name for entry in dataclasses.fields(AttentionCell)} - {"correctness"}
    correctness = None
    if found["gate_tolerance"] is not None:
        error = math.nan if found["gate_error"] is None else found["gate_error"]
        correctness = Verdict(
            error,
            found["gate_tolerance"],
            found["gate_rows"],
            found["gate_undecided"],
            found["reason"] if found["status"] == WRONG else "",
        )
    return AttentionCell(correctness=correctness, **{name: found[name] for name in names})


def _read_ceilings(found: dict[str, Any] | None) -> Ceilings | None:
    if found is None:
        return None
    tuples = {name: tuple(found[name]) for name in ("copy_ms", "matmul_ms")}
    return Ceilings(**(found | tuples))
