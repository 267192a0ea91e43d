"""What fits into the time: predictions from shorter sequences, and repetitions of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MIN_REPEATS = 3
SLOW_MS = 1000.0  # calls longer than this are not repeated only to learn their time
MEMORY_SHARE = 0.8  # of what is free
SPENT = "the time budget was spent before"


class Contestant(Protocol):
    """Who is measured, and how much more a longer sequence takes."""

    @property
    def key(self) -> str: ...

    def time_growth(self, shorter: int, longer: int) -> float: ...

    def memory_growth(self, shorter: int, longer: int) -> float: ...


@dataclass(frozen=True)
class Seen:
    """What one contestant took at one length; `extra_bytes` as in `Cell`."""

    n: int
    ms: float
    extra_bytes: int


@dataclass
class History:
    """The longest measured call of each contestant, to predict the next length from."""

    seen: dict[str, Seen] = field(default_factory=dict)

    def keep(self, one: Contestant, seen: Seen) -> None:
        known = self.seen.get(one.key)
        if known is None or known.n <= seen.n:
            self.seen[one.key] = seen

    def milliseconds(self, one: Contestant, n: int) -> float | None:
        """Predicted time of one call; None where nothing was measured yet."""
        known = self.seen.get(one.key)
        return None if known is None else known.ms * one.time_growth(known.n, n)

    def quick(self, one: Contestant, n: int) -> bool:
        """Whether one more call, to warm up or to be timed alone, costs little as far as known."""
        return (self.milliseconds(one, n) or 0.0) < SLOW_MS

    def extra_bytes(self, one: Contestant, n: int) -> float | None:
        """Predicted `extra_bytes`; None where nothing was measured yet."""
        known = self.seen.get(one.key)
        return None if known is None else known.extra_bytes * one.memory_growth(known.n, n)


def length_share(n: int, ahead: Sequence[int]) -> float:
    """The share of the time left that length n may take, with `ahead` (n among them) to come.

    Between the growth of sparse and of full attention, so that neither is left without time.
    """
    return float(n**1.5 / sum(length**1.5 for length in ahead))


def least_seconds(ms: float, least: int) -> float:
    """What calls of `ms` cost: a check, `least` repetitions, and one more call of what is quick."""
    return (least + (1 if ms >= SLOW_MS else 2)) * ms / 1e3


def too_slow(ms: float, seconds: float, least: int) -> str:
    """Why calls of `ms` cannot be checked and timed `least` times within `seconds`; empty if so."""
    if seconds <= 0:
        return SPENT
    if least_seconds(ms, least) <= seconds:
        return ""
    return (
        f"a call would take about {ms / 1e3:.1f} s: its check and {least} repetitions do not fit "
        "into the time budget"
    )


def refuse(
    contestants: Sequence[Contestant],
    history: History,
    n: int,
    *,
    seconds: float,
    free_bytes: int | None = None,
    least: int = MIN_REPEATS,
) -> dict[str, str]:
    """Contestants that must be left out at length n, each with the reason.

    The first contestant is the baseline and is served first; then the quick before the slow.

    Args:
        seconds: for the checks and `least` repetitions of all.
        free_bytes: None where a call that may fill the memory is to be tried.
    """
    out: dict[str, str] = {}
    left = seconds
    predicted = {one.key: history.milliseconds(one, n) or 0.0 for one in contestants}
    for one in [*contestants[:1], *sorted(contestants[1:], key=lambda one: predicted[one.key])]:
        memory = history.extra_bytes(one, n)
        if memory and free_bytes and memory > MEMORY_SHARE * free_bytes:
            out[one.key] = (
                f"would take about {memory / 2**30:.0f} GiB of {free_bytes / 2**30:.0f} GiB free"
            )
            continue
        ms = predicted[one.key]
        if reason := too_slow(ms, left, least):
            out[one.key] = reason
        else:
            left -= least_seconds(ms, least)
    return out


def repetitions(
    ms: Mapping[str, float], *, seconds: float, most: int, least: int = MIN_REPEATS
) -> dict[str, int]:
    """How often each cell is timed: alike in time, from `least` to `most` times.

    What quick cells leave over goes to the slower ones.
    """
    found = {}
    left = 1e3 * seconds
    for rank, key in enumerate(sorted(ms, key=lambda name: ms[name])):
        fair = left / (len(ms) - rank)
        found[key] = int(min(most, max(least, fair / max(ms[key], 1e-6))))
        left -= found[key] * ms[key]
    return found


def rounds_of(count: int, rounds: int) -> set[int]:
    """The rounds in which a cell that is timed `count` times takes part, evenly spread."""
    return {index * rounds // count for index in range(count)} if count else set()
