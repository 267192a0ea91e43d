"""What a prefill benchmark found, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sa_patch.benchmark.goals import Goal
from sa_patch.benchmark.record import FAILED, Cell

SCHEMA = 1
KIND = "sa_patch prefill benchmark"


@dataclass(kw_only=True)
class Prefill(Cell):
    """One way to run one model on prompts of one length.

    A call is timed from token ids to the last token's logits and a filled cache, permutations and
    plans made anew; `extra_bytes` is beside the weights.

    Args:
        model: its name.
        full: whether every query sees all keys before it.
        parts: seconds in each of `PARTS`, from one more pass; they add up to that pass.
        calls: how often each backend was called in one pass.
        draw_seconds: drawing one layer's permutation; None for other patterns.
        decode_seconds: of every token written after the prompt; empty if not measured.
    """

    model: str
    full: bool
    parts: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    draw_seconds: float | None = None
    decode_seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.label}, {self.backend}" if self.backend else self.label

    @property
    def seconds(self) -> list[float]:
        """Of every timed call."""
        return [ms / 1e3 for ms in self.samples_ms]

    @property
    def median(self) -> float | None:
        """Seconds; None where it was not timed."""
        return None if self.median_ms is None else self.median_ms / 1e3

    def content(self) -> dict[str, Any]:
        """The cell as JSON values."""
        values = dataclasses.asdict(self)
        for name in ("samples_ms", "started_s"):
            del values[name]
        return values | {"seconds": self.seconds, "peak_bytes": values.pop("extra_bytes")}


@dataclass
class Verdict:
    """One check of a model before it is timed.

    Args:
        error: relative error of logits, norm over norm; 0 where bits agree.
        allowed: what two implementations in the same precision differ by, with room.
    """

    model: str
    check: str
    label: str
    error: float
    allowed: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


@dataclass
class PrefillBench:
    """A whole run.

    Args:
        provenance, options: as in a benchmark of attention.
        models: facts of each model by name: layers, parameters, whether its weights are random.
        refused: per model, what could not take part and why.
    """

    provenance: dict[str, Any]
    options: dict[str, Any]
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    complete: bool = False

    def at(self, model: str, n: int) -> list[Prefill]:
        return [one for one in self.prefills if (one.model, one.n) == (model, n)]

    def lengths(self, model: str) -> list[int]:
        return sorted({one.n for one in self.prefills if one.model == model})

    def wrong(self) -> list[str]:
        """Everything that gave a wrong result or failed, in words."""
        bad = [
            f"wrong: {one.model}: {one.check}, {one.label}: off by {one.error:.2g}, allowed "
            f"{one.allowed:.2g} {one.detail}".rstrip()
            for one in self.verdicts
            if not one.passed
        ]
        return bad + [
            f"failed: {one.model}: {one.name}, n = {one.n}: {one.reason}"
            for one in self.prefills
            if one.status == FAILED
        ]

    def content(self) -> dict[str, Any]:
        """The run as JSON values."""
        cells = [one.content() for one in self.prefills]
        return {"kind": KIND, "schema": SCHEMA} | dataclasses.asdict(self) | {"prefills": cells}


def fastest(cells: Sequence[Prefill]) -> Prefill | None:
    """The one with the least median among timed cells."""
    timed = [one for one in cells if one.median is not None]
    return min(timed, key=lambda one: one.median or 0.0, default=None)


def best_full(cells: Sequence[Prefill]) -> Prefill | None:
    """The fastest full attention among timed cells."""
    return fastest([one for one in cells if one.full])
