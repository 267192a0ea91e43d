"""One length of a benchmark: check every contestant, then time them in turn.

No time is given before a contestant has passed its check. The cells of one length are timed in
turn and in random order, so that a machine that drifts hits them alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sa_patch.benchmark.clock import Clock
from sa_patch.benchmark.output import Say
from sa_patch.benchmark.record import TIMED, Cell
from sa_patch.benchmark.time_plan import (
    MIN_REPEATS,
    SPENT,
    Contestant,
    History,
    Seen,
    refuse,
    repetitions,
    rounds_of,
)

WORTH_A_LINE = 5.0  # seconds


@dataclass
class Entry:
    """One contestant at one length.

    Args:
        cell: its place in the record.
        check: shows whether the result is right and what a call takes; None where no time may be
            given, the reason then being in the cell.
        milliseconds: makes one call and times it.
    """

    contestant: Contestant
    cell: Cell
    check: Callable[[], Seen | None]
    milliseconds: Callable[[], float]

    @property
    def key(self) -> str:
        return self.contestant.key


@dataclass
class Measuring:
    """What lasts from one length to the next.

    Args:
        deadline: time of `time.monotonic` at which the budget is spent.
        most: most timed calls of a cell.
        say: told one line at a time how far the run is.
        least: timed calls from which on a cell counts.
        seed: of the order of calls.
    """

    clock: Clock
    deadline: float
    most: int
    say: Say
    least: int = MIN_REPEATS
    seed: int = 0
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self.least = min(self.least, self.most)
        self.began = time.monotonic()
        self._random = random.Random(self.seed)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def measure(
        self,
        n: int,
        entries: Sequence[Entry],
        share: float,
        *,
        least_share: float | None = None,
        free_bytes: int | None = None,
    ) -> list[Entry]:
        """Check and time everything at length n.

        Args:
            entries: the baseline first; their cells are in the record already, so that an
                interrupt keeps them.
            share: of the time left, what this length may take.
            least_share: what the checks and the fewest repetitions may take of it; `share` by
                default.
            free_bytes: memory that can be taken; by default as much as is asked for.

        Returns:
            Those that were timed.
        """
        reasons = refuse(
            [entry.contestant for entry in entries],
            self.history,
            n,
            seconds=self.left() * (share if least_share is None else least_share),
            free_bytes=free_bytes,
            least=self.least,
        )
        for entry in entries:
            interrupted = "interrupted before it was timed often enough"
            entry.cell.reason = reasons.get(entry.key, interrupted)
        self.say(f"n = {n}: checking {len(entries) - len(reasons)} contestants")
        ready: list[Entry] = []
        owed = 0.0  # seconds of repetitions, which come later and must still find their time
        for entry in entries:
            if entry.key not in reasons and (seen := self._check(entry, owed)) is not None:
                self.history.keep(entry.contestant, seen)
                owed += self.least * seen.ms / 1e3
                ready.append(entry)
        self._take_turns(n, ready, share)
        self.clock.forget()
        return [entry for entry in ready if entry.cell.status == TIMED]

    def _check(self, entry: Entry, owed: float) -> Seen | None:
        started, cell = time.monotonic(), entry.cell
        if self.left() <= owed:
            cell.reason = SPENT
            return None
        try:
            return entry.check()
        except Exception as error:
            cell.give_up(error)
            self.clock.forget()
            return None
        finally:
            if (seconds := time.monotonic() - started) > WORTH_A_LINE:
                self.say(f"  {cell.label} on {cell.backend}: check and compilation {seconds:.0f} s")

    def _take_turns(self, n: int, ready: Sequence[Entry], share: float) -> None:
        expected = {entry.key: self.history.seen[entry.key].ms for entry in ready}
        counts = repetitions(
            expected, seconds=max(0.0, self.left() * share), most=self.most, least=self.least
        )
        rounds = max(counts.values(), default=0)
        self.say(f"n = {n}: timing {len(ready)} contestants, up to {rounds} times each")
        turns = {key: rounds_of(count, rounds) for key, count in counts.items()}
        alive = list(ready)
        for turn in range(rounds):
            self._random.shuffle(alive)
            for entry in list(alive):
                late = entry.cell.status == TIMED and self.left() < expected[entry.key] / 1e3
                if turn in turns[entry.key] and not late and not self._sample(entry):
                    alive.remove(entry)
        for entry in alive:
            # The one call after the check may have been unlucky; predictions rest on the median.
            if (median := entry.cell.median_ms) is not None:
                self.history.keep(entry.contestant, Seen(n, median, entry.cell.extra_bytes or 0))

    def _sample(self, entry: Entry) -> bool:
        """Time one call; a contestant that fails now is given up."""
        began, cell = time.monotonic() - self.began, entry.cell
        try:
            ms = entry.milliseconds()
        except Exception as error:
            cell.give_up(error)
            self.clock.forget()
            return False
        cell.samples_ms.append(ms)
        cell.started_s.append(round(began, 4))
        if len(cell.samples_ms) >= self.least:
            cell.status, cell.reason = TIMED, ""
        return True
