"""What a prefill benchmark found, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa_patch.benchmark.goals import Goal
from sa_patch.benchmark.record import FAILED, Bench, Cell, read_content
from sa_patch.errors import UserError

NOISE = "noise"


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
        for name in ("samples_ms", "started_s", "passes"):
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
class PrefillBench(Bench[Prefill]):
    """A whole run.

    Args:
        models: facts of each model by name: layers, parameters, whether its weights are random.
        refused: per model, what could not take part and why.
    """

    kind = "sa_patch prefill benchmark"

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def checked(self, model: str) -> bool:
        """Whether all checks of a model were made; that of the noise is the last."""
        return any(one.model == model and one.check == NOISE for one in self.verdicts)

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
            for one in self.where(status=FAILED)
        ]

    def content(self) -> dict[str, Any]:
        """The run as JSON values."""
        return super().content() | {
            "models": self.models,
            "refused": self.refused,
            "verdicts": [dataclasses.asdict(one) for one in self.verdicts],
            "prefills": [one.content() for one in self.cells],
            "goals": [dataclasses.asdict(one) for one in self.goals],
        }


def read_prefill(path: Path) -> PrefillBench:
    """Read a run from its JSON; when each call began is not in there.

    Raises:
        UserError: if the file is missing, torn, or of another kind or schema.
    """
    content = read_content(path, PrefillBench.kind, PrefillBench.schema)
    try:
        return PrefillBench(
            provenance=content["provenance"],
            options=content["options"],
            complete=content["complete"],
            cells=[_read_cell(one) for one in content["prefills"]],
            models=content["models"],
            refused=content["refused"],
            verdicts=[Verdict(**one) for one in content["verdicts"]],
            goals=[Goal(**one) for one in content["goals"]],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} lacks a part of a benchmark: {error}") from error


def _read_cell(found: dict[str, Any]) -> Prefill:
    values = dict(found)
    samples = [1e3 * seconds for seconds in values.pop("seconds")]
    return Prefill(**values | {"samples_ms": samples, "extra_bytes": values.pop("peak_bytes")})
