"""What every stage is given, and what it hands back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa_patch.benchmark.tables import Say


@dataclass(frozen=True)
class Visit:
    """A stage's circumstances.

    Args:
        out: folder of all files.
        device: "cuda", or "cpu" for a rehearsal.
        small: tiny lengths and models.
        deadline: of `time.monotonic`; nothing new is begun after it.
    """

    out: Path
    device: str
    small: bool
    deadline: float
    say: Say

    @property
    def left(self) -> float:
        """Seconds, at least one: what has begun is to be asked for something."""
        return max(1.0, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Found:
    """What a stage came to.

    Args:
        rows: what was measured, and the value, for the short table at the end.
        wrong: everything that gave a wrong result or failed, in words.
        missing: how many of its measurements found no time.
    """

    rows: Sequence[tuple[str, str]]
    wrong: Sequence[str] = ()
    missing: int = 0
