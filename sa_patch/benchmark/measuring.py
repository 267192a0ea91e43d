"""One length of a benchmark: check every contestant, then time them in turn.

No time is given before a contestant has passed its check. The cells of one length are timed in
turn and in random order, so that a machine that drifts hits them alike.
"""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from sa_patch.benchmark.clock import Clock
from sa_patch.benchmark.record import TIMED, C
from sa_patch.benchmark.tables import Say
from sa_patch.benchmark.time_plan import (
    MIN_REPEATS,
    Contestant,
    History,
    Seen,
    refuse,
    repetitions,
    rounds_of,
    too_slow,
)

WORTH_A_LINE = 5.0  # seconds
K = TypeVar("K", bound=Contestant)


class Measurer(ABC, Generic[K, C]):
    """What lasts from one length to the next.

    Args:
        deadline: time of `time.monotonic` at which the budget is spent.
        most: most timed calls of a cell.
        say: told one line at a time how far the run is.
        least: timed calls from which on a cell counts.
        seed: of the order of calls.
        number: of this pass over the contestants.
    """

    def __init__(
        self,
        clock: Clock,
        deadline: float,
        most: int,
        say: Say,
        *,
        least: int = MIN_REPEATS,
        seed: int = 0,
        number: int = 0,
    ) -> None:
        self.number = number
        self.clock, self.deadline, self.say = clock, deadline, say
        self.most, self.least = most, min(least, most)
        self.history = History()
        self._began = time.monotonic()
        self._random = random.Random(seed)

    @abstractmethod
    def check(self, one: K, cell: C) -> Seen | None:
        """See whether the result is right, and what a call takes.

        Returns:
            None where no time may be given, the reason then being in the cell.
        """

    @abstractmethod
    def milliseconds(self, one: K) -> float:
        """Make one call and time it."""

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def check_and_time(
        self,
        n: int,
        pairs: Sequence[tuple[K, C]],
        share: float,
        *,
        within_share: bool = True,
        free_bytes: int | None = None,
    ) -> None:
        """Check and time everything at length n.

        Args:
            pairs: contestants with their cells, the baseline first. The cells are in the record
                already, so that an interrupt keeps them.
            share: of the time left, what this length may take.
            within_share: whether the checks and the fewest repetitions must fit into it too, and
                not only before the deadline.
            free_bytes: memory that can be taken; by default as much as is asked for.
        """
        reasons = refuse(
            [one for one, _ in pairs],
            self.history,
            n,
            seconds=self.left() * share if within_share else math.inf,
            free_bytes=free_bytes,
            least=self.least,
        )
        for one, cell in pairs:
            cell.reason = reasons.get(one.key, "interrupted before it was timed often enough")
        if len(reasons) < len(pairs):
            self.say(f"n = {n}: checking {len(pairs) - len(reasons)} contestants")
        ready: list[tuple[K, C]] = []
        owed = 0.0  # seconds of repetitions, which come later and must still find their time
        for one, cell in pairs:
            if one.key not in reasons and (seen := self._check(one, cell, owed)) is not None:
                self.history.keep(one, seen)
                owed += self.least * seen.ms / 1e3
                ready.append((one, cell))
        if ready:
            self._take_turns(n, ready, share)
        self.clock.forget()

    def _check(self, one: K, cell: C, owed: float) -> Seen | None:
        started = time.monotonic()
        expected = self.history.milliseconds(one, cell.n) or 0.0
        if reason := too_slow(expected, self.left() - owed, self.least):
            cell.reason = reason
            return None
        try:
            return self.check(one, cell)
        except Exception as error:
            cell.give_up(error)
            self.clock.forget()
            return None
        finally:
            if (seconds := time.monotonic() - started) > WORTH_A_LINE:
                self.say(f"  {cell.label} on {cell.backend}: check and compilation {seconds:.0f} s")

    def _take_turns(self, n: int, ready: Sequence[tuple[K, C]], share: float) -> None:
        expected = {one.key: self.history.seen[one.key].ms for one, _ in ready}
        counts = repetitions(
            expected, seconds=max(0.0, self.left() * share), most=self.most, least=self.least
        )
        rounds = max(counts.values())
        self.say(f"n = {n}: timing {len(ready)} contestants, up to {rounds} times each")
        turns = {key: rounds_of(count, rounds) for key, count in counts.items()}
        alive = list(ready)
        for turn in range(rounds):
            self._random.shuffle(alive)
            for one, cell in list(alive):
                late = cell.status == TIMED and self.left() < expected[one.key] / 1e3
                if turn in turns[one.key] and not late and not self._sample(one, cell):
                    alive.remove((one, cell))
        for one, cell in alive:
            # The one call after the check may have been unlucky; predictions rest on the median.
            if cell.median_ms is not None:
                self.history.keep(one, Seen(n, cell.median_ms, cell.extra_bytes or 0))

    def _sample(self, one: K, cell: C) -> bool:
        """Time one call; a contestant that fails now is given up."""
        began = time.monotonic() - self._began
        try:
            ms = self.milliseconds(one)
        except Exception as error:
            cell.give_up(error)
            self.clock.forget()
            return False
        cell.samples_ms.append(ms)
        cell.started_s.append(round(began, 4))
        cell.passes.append(self.number)
        if len(cell.samples_ms) >= self.least:
            cell.status, cell.reason = TIMED, ""
        return True
