"""How a sweep shows where it is: a bar with the time left, or plain lines where there is no tty."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


class TimeLeft:
    """Estimate the seconds that remain from the finished cells, task by task.

    `at_once` is how many cells are computed at a time.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.at_once = 1
        self._waiting = Counter(tasks)
        self._spent: dict[str, list[float]] = defaultdict(list)

    def finished(self, task: str, seconds: float) -> None:
        self._waiting[task] -= 1
        self._spent[task].append(seconds)

    def seconds(self) -> float | None:
        """None before the first cell has finished."""
        everything = [each for spent in self._spent.values() for each in spent]
        if not everything:
            return None
        overall = sum(everything) / len(everything)

        def per_cell(task: str) -> float:
            spent = self._spent.get(task)
            return sum(spent) / len(spent) if spent else overall

        alone = sum(count * per_cell(task) for task, count in self._waiting.items())
        return alone / self.at_once


def duration_text(seconds: float) -> str:
    """A duration for people: ``3.2 s``, ``12 s``, ``4 min``, ``3 h 20 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _screen() -> Console:
    """stderr, or in a notebook, which shows stderr as if it were an error, stdout.

    The real stream, held now: while a cell runs, sys.stderr is turned away from the screen.
    """
    options: dict[str, Any] = {"highlight": False, "soft_wrap": True}
    if Console().is_jupyter:
        # Left to itself rich makes an output of every line, or a line of every redrawn bar.
        return Console(file=sys.stdout, force_jupyter=False, force_terminal=False, **options)
    return Console(file=sys.stderr, **options)


class SweepProgress:
    """Lines for finished cells and, on a terminal, a bar below them."""

    def __init__(self, tasks: Sequence[str], console: Console | None = None) -> None:
        self._console = console or _screen()
        self._left = TimeLeft(tasks)
        self._total = len(tasks)
        self._done = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self._console.is_terminal,
        )
        self._row = self._bar.add_task("", total=self._total, left="")

    def __enter__(self) -> SweepProgress:
        # Older releases of rich print an empty line when a disabled bar stops.
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def say(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style=style))

    def starts(self, label: str, at_once: int = 1) -> None:
        self._left.at_once = max(1, at_once)
        beside = f"  ({at_once} at once)" if at_once > 1 else ""
        self._bar.update(self._row, description=f"{label}{beside}")

    def finished(
        self, task: str, label: str, outcome: str, seconds: float, style: str = ""
    ) -> None:
        """One cell is done: a line for it, and a new estimate."""
        self._done += 1
        self._left.finished(task, seconds)
        left = self._left.seconds()
        remains = f"about {duration_text(left)} left" if left and self._done < self._total else ""
        place = f"[{self._done}/{self._total}]"
        parts = [place, label, outcome, duration_text(seconds), remains]
        self.say("  ".join(part for part in parts if part), style)
        self._bar.update(self._row, completed=self._done, left=remains)


def outcome_text(primary: dict[str, Any]) -> str:
    """``acc_norm 0.362 ± 0.054``"""
    name = str(primary["metric"]).partition(",")[0]
    spread = f" ± {primary['stderr']:.3f}" if primary.get("stderr") is not None else ""
    return f"{name} {primary['value']:.4g}{spread}"
