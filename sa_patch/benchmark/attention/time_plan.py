"""What fits into the time: predictions from shorter sequences, and repetitions of each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sa_patch.benchmark.attention.candidates import Candidate

MIN_REPEATS = 3
SLOW_MS = 1000.0  # calls longer than this are not repeated only to learn their time
MEMORY_SHARE = 0.8  # of what is free


@dataclass(frozen=True)
class Seen:
    """What one contestant took at one length; `extra_bytes` beside inputs and result."""

    n: int
    ms: float
    extra_bytes: int


@dataclass
class History:
    """The longest measured call of each contestant, to predict the next length from.

    Time grows as the FLOPs that the pattern needs, memory in proportion to n; where a dense mask
    is made both grow as n squared.
    """

    seen: dict[str, Seen] = field(default_factory=dict)

    def keep(self, one: Candidate, seen: Seen) -> None:
        known = self.seen.get(one.key)
        if known is None or known.n <= seen.n:
            self.seen[one.key] = seen

    def milliseconds(self, one: Candidate, n: int) -> float | None:
        """Predicted time of one call; None where nothing was measured yet."""
        known = self.seen.get(one.key)
        if known is None:
            return None
        if one.dense:
            return known.ms * (n / known.n) ** 2
        return known.ms * needed_work(one, n) / needed_work(one, known.n)

    def extra_bytes(self, one: Candidate, n: int) -> float | None:
        """Predicted memory beside inputs and result; None where nothing was measured yet."""
        known = self.seen.get(one.key)
        if known is None:
            return None
        return float(known.extra_bytes * (n / known.n) ** (2 if one.dense else 1))


def needed_work(one: Candidate, n: int) -> float:
    """Multiply-adds in units of head_dim for one head: visible pairs twice, choosing once."""
    # Every pattern's expected number of visible pairs is its exact number: stochastic attention
    # sees each pair of near slots once, whatever the permutation.
    pairs = float(one.shown.keys_per_query(n).sum())
    return 2 * pairs + float(one.shown.selection_dots(n).sum())


def length_share(n: int, ahead: Sequence[int]) -> float:
    """The share of the time left that length n may take, with `ahead` (n among them) to come.

    Between the growth of sparse and of full attention, so that neither is left without time.
    """
    return float(n**1.5 / sum(length**1.5 for length in ahead))


def least_calls(ms: float) -> int:
    """Calls that a cell costs at least: check, repetitions, and one to learn its time if quick."""
    return MIN_REPEATS + (1 if ms >= SLOW_MS else 2)


def refuse(
    contestants: Sequence[Candidate],
    history: History,
    n: int,
    *,
    seconds: float,
    free_bytes: int | None,
) -> dict[str, str]:
    """Contestants that must be left out at length n, each with the reason.

    The first contestant is the baseline and is served first; then the quick before the slow.
    """
    out: dict[str, str] = {}
    left = seconds
    predicted = {one.key: history.milliseconds(one, n) for one in contestants}
    slowest_last = sorted(contestants[1:], key=lambda one: predicted[one.key] or 0.0)
    for one in [*contestants[:1], *slowest_last]:
        memory = history.extra_bytes(one, n)
        if memory and free_bytes and memory > MEMORY_SHARE * free_bytes:
            out[one.key] = (
                f"would take about {memory / 2**30:.0f} GiB of {free_bytes / 2**30:.0f} GiB free"
            )
            continue
        ms = predicted[one.key] or 0.0
        cost = least_calls(ms) * ms / 1e3
        if seconds <= 0:
            out[one.key] = "the time budget was spent before this length"
        elif cost > left:
            out[one.key] = (
                f"a call would take about {ms / 1e3:.1f} s: its check and {MIN_REPEATS} "
                "repetitions do not fit into the time budget"
            )
        else:
            left -= cost
    return out


def repetitions(ms: Mapping[str, float], *, seconds: float, most: int) -> dict[str, int]:
    """How often each cell is timed: alike in time, at least 3 times and at most `most`.

    What quick cells leave over goes to the slower ones.
    """
    found = {}
    left = 1e3 * seconds
    for rank, key in enumerate(sorted(ms, key=lambda name: ms[name])):
        fair = left / (len(ms) - rank)
        count = int(min(most, max(MIN_REPEATS, fair / max(ms[key], 1e-6))))
        found[key] = min(count, most)
        left -= found[key] * ms[key]
    return found


def spread(count: int, rounds: int) -> set[int]:
    """The rounds in which a cell that is timed `count` times takes part, evenly spread."""
    return {index * rounds // count for index in range(count)} if count else set()
