"""Goals that measurements are held to, and how they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sa_patch.benchmark.tables import number, table

MET, MISSED, UNMEASURED = "met", "missed", "could not be measured"


@dataclass(frozen=True)
class Goal:
    """One goal; `value` is None where it could not be measured, and `detail` says why.

    Where a goal covers several lengths, `value` is the worst of them.
    """

    name: str
    target: float
    value: float | None
    status: str
    detail: str


def unmeasured(name: str, target: float, why: str) -> Goal:
    """A goal that could not be measured."""
    return Goal(name, target, None, UNMEASURED, why)


def judged(name: str, target: float, value: float, detail: str, *, at_least: bool) -> Goal:
    """A goal that was measured: `value` must be at least, or else at most, `target`."""
    met = value >= target if at_least else value <= target
    return Goal(name, target, value, MET if met else MISSED, detail)


def goals_markdown(goals: Sequence[Goal]) -> str:
    """A row for each goal."""
    return table(
        "goal | >target | >measured | status | detail",
        ((one.name, f"{one.target:g}", _value(one), one.status, one.detail) for one in goals),
    )


def goal_lines(goals: Sequence[Goal]) -> list[str]:
    """Every goal, and below it what it came to."""
    found = []
    for goal in goals:
        found.append(f"{goal.status.upper()}: {goal.name}: {_value(goal)}, target {goal.target:g}")
        found.append(f"    {goal.detail}")
    return found


def _value(goal: Goal) -> str:
    return "-" if goal.value is None else number(goal.value)
