"""What a prefill benchmark found, as data."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_patch.benchmark.attention.goals import Goal
from sa_patch.files.atomic_write import write_whole

SCHEMA = 1
KIND = "sa_patch prefill benchmark"
TIMED, SKIPPED, OUT_OF_MEMORY, FAILED = "timed", "skipped", "out of memory", "failed"


@dataclass
class Prefill:
    """One way to run one model on prompts of one length.

    Args:
        model, n, label, backend, full: which; `full` where every query sees all keys before it.
        status: one of "timed", "skipped", "out of memory" and "failed".
        reason: why it was not timed.
        seconds: of every timed prefill: from token ids to the last token's logits and a filled
            cache, permutations and plans made anew.
        peak_bytes: peak of memory beside the weights; None if not measured.
        parts: seconds in each of `PARTS`, from one more pass; they add up to that pass.
        calls: how often each backend was called in one pass.
        draw_seconds: drawing one layer's permutation; None for other patterns.
        decode_seconds: of every token written after the prompt; empty if not measured.
    """

    model: str
    n: int
    label: str
    backend: str
    full: bool
    status: str = SKIPPED
    reason: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    parts: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    draw_seconds: float | None = None
    decode_seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.label}, {self.backend}" if self.backend else self.label

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


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


def best_full(cells: list[Prefill]) -> Prefill | None:
    """The fastest full attention among timed cells."""
    timed = [one for one in cells if one.full and one.median is not None]
    return min(timed, key=lambda one: one.median or 0.0, default=None)


def write_json(path: Path, bench: PrefillBench) -> None:
    """Write a run as JSON."""
    content = {"kind": KIND, "schema": SCHEMA} | dataclasses.asdict(bench)
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
