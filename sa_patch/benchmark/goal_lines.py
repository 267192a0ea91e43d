"""Goals as text: a Markdown table, and lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from sa_patch.benchmark.attention.goals import Goal
from sa_patch.benchmark.attention.tables import number


def goals_markdown(goals: Sequence[Goal]) -> str:
    """A row for each goal."""
    lines = ["| goal | target | measured | status | detail |", "| --- | ---: | ---: | --- | --- |"]
    for goal in goals:
        lines.append(
            f"| {goal.name} | {goal.target:g} | {_value(goal)} | {goal.status} | {goal.detail} |"
        )
    return "\n".join(lines)


def goal_lines(goals: Sequence[Goal]) -> list[str]:
    """Every goal, and below it what it came to."""
    found = []
    for goal in goals:
        found.append(f"{goal.status.upper()}: {goal.name}: {_value(goal)}, target {goal.target:g}")
        found.append(f"    {goal.detail}")
    return found


def _value(goal: Goal) -> str:
    return "-" if goal.value is None else number(goal.value)
