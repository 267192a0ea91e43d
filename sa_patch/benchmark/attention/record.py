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
from sa_patch.benchmark.record import FAILED, TIMED, WRONG, Bench, Cell, quartiles, read_content
from sa_patch.errors import UserError


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
        plan_ms: a layer's share of what is drawn and planned for several layers at once, beside
            `samples_ms`; None where each call does so for its own layer.
    """

    method: str
    rival: bool
    window: int | None
    automatic: bool = False
    correctness: Verdict | None = None
    mean_keys: float = 0.0
    flops: float = 0.0
    io_bytes: int = 0
    plan_ms: float | None = None

    @property
    def layer_ms(self) -> list[float]:
        """Every timed call, with its layer's share of planning."""
        return [ms + (self.plan_ms or 0.0) for ms in self.samples_ms]

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.layer_ms) if self.status == TIMED else None

    @property
    def quartiles_ms(self) -> tuple[float, float] | None:
        return quartiles(self.layer_ms) if self.status == TIMED else None

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
            the median. None where SDPA full was not timed in the same pass.
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

    A machine that slows down for a while slows both, so that the ratio stays. Calls of a pass in
    which `base` was not timed have none.
    """
    calls: dict[int, list[tuple[float, float]]] = {}
    for number, at, ms in zip(base.passes, base.started_s, base.layer_ms, strict=True):
        calls.setdefault(number, []).append((at, ms))

    def nearest(number: int, at: float) -> float:
        return min(calls[number], key=lambda call: abs(call[0] - at))[1]

    return [
        nearest(number, at) / ms
        for number, at, ms in zip(cell.passes, cell.started_s, cell.layer_ms, strict=True)
        if number in calls
    ]


@dataclass
class AttentionBench(Bench[AttentionCell]):
    """A whole run.

    Args:
        ceilings: None until they are measured.
        not_served: methods that a backend refuses here.
    """

    kind = "sa_patch attention benchmark"

    ceilings: Ceilings | None = None
    not_served: list[NotServed] = field(default_factory=list)

    def baseline(self, n: int) -> AttentionCell | None:
        """SDPA's full attention at this length, if it was timed."""
        return next(iter(self.where(n=n, rival=True, backend="torch", status=TIMED)), None)

    def rates(self, cell: AttentionCell) -> Rates | None:
        """The figures that follow from a cell's median; None for a cell without one."""
        median, ceilings, baseline = cell.median_ms, self.ceilings, self.baseline(cell.n)
        if median is None or ceilings is None:
            return None
        ratios = [] if baseline is None else paired_ratios(baseline, cell)
        tflops, gigabytes = cell.flops / median / 1e9, cell.io_bytes / median / 1e6
        floor = max(
            cell.flops / ceilings.matmul_tflop_per_s / 1e9,
            cell.io_bytes / ceilings.copy_gb_per_s / 1e6,
        )
        return Rates(
            speedup=statistics.median(ratios) if ratios else None,
            speedup_quartiles=quartiles(ratios) if ratios else None,
            tflop_per_s=tflops,
            matmul_share=tflops / ceilings.matmul_tflop_per_s,
            gb_per_s=gigabytes,
            copy_share=gigabytes / ceilings.copy_gb_per_s,
            floor_ms=floor,
            gap=median / floor,
        )

    def wrong(self) -> list[str]:
        """Everything that gave a wrong result or failed, in words."""
        return [
            f"{c.status}: {c.label} on {c.backend}, n = {c.n}: {c.reason}"
            for c in self.cells
            if c.status in (WRONG, FAILED)
        ]

    def content(self) -> dict[str, Any]:
        """The run as JSON values; what follows from the samples is among them."""
        return super().content() | {
            "ceilings": None if self.ceilings is None else dataclasses.asdict(self.ceilings),
            "not_served": [dataclasses.asdict(one) for one in self.not_served],
            "cells": [self._cell_content(cell) for cell in self.cells],
        }

    def _cell_content(self, cell: AttentionCell) -> dict[str, Any]:
        values, found, rates = dataclasses.asdict(cell), cell.correctness, self.rates(cell)
        del values["correctness"]
        if not any(cell.passes):
            del values["passes"]
        if cell.plan_ms is None:
            del values["plan_ms"]
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
    content = read_content(path, AttentionBench.kind, AttentionBench.schema)
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
    names = {entry.name for entry in dataclasses.fields(AttentionCell)}
    names -= {"correctness", "passes", "plan_ms"}
    cell = AttentionCell(**{name: found[name] for name in names}, plan_ms=found.get("plan_ms"))
    # Written where there was more than one.
    cell.passes = found.get("passes") or [0] * len(cell.samples_ms)
    if found["gate_tolerance"] is not None:
        cell.correctness = Verdict(
            error=math.nan if found["gate_error"] is None else found["gate_error"],
            tolerance=found["gate_tolerance"],
            compared=found["gate_rows"],
            undecided=found["gate_undecided"],
            reason=cell.reason if cell.status == WRONG else "",
        )
    return cell


def _read_ceilings(found: dict[str, Any] | None) -> Ceilings | None:
    if found is None:
        return None
    tuples = {name: tuple(found[name]) for name in ("copy_ms", "matmul_ms")}
    return Ceilings(**(found | tuples))
