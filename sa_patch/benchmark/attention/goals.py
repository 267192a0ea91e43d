"""The goals that the GPU kernels are held to, judged from what a benchmark measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sa_patch.benchmark.attention.record import AttentionBench, AttentionCell
from sa_patch.benchmark.goals import MET, UNMEASURED, Goal, judged, unmeasured
from sa_patch.benchmark.record import fastest
from sa_patch.benchmark.tables import number
from sa_patch.patterns import SA

WINDOW = 256
CHOOSING = ("moba", "block_topk")
LINEAR = 1.1  # largest exponent of n that still counts as linear growth
FLASH_3 = "FlashAttention-3"
Choice = Callable[[AttentionCell], bool]


def judge_goals(bench: AttentionBench, window: int = WINDOW) -> list[Goal]:
    """All goals, in the order of their importance."""
    sa_label = str(SA(window))

    sa = partial(_ours, sa_label)

    def flex(cell: AttentionCell) -> bool:
        return cell.label == sa_label and cell.backend == "flex"

    def full(cell: AttentionCell) -> bool:
        return cell.method == "full"

    flex_name = "SA over compiled FlexAttention, same window (times faster, worst n)"
    choosing = dict.fromkeys(cell.label for cell in bench.cells if cell.method in CHOOSING)
    ratio = partial(_ratio_goal, bench)
    return [
        _flash_goal(bench, window, sa),
        ratio(flex_name, 1.5, flex, sa),
        ratio("SA over the best full attention at 32K", 10, full, sa, only=32768),
        ratio("SA over the best full attention at 128K", 40, full, sa, only=131072),
        *(
            ratio(
                f"{label} over the best full attention from 8K up (worst n)",
                *(1.0, full, partial(_ours, label)),
                at_least=8192,
            )
            for label in choosing
        ),
        _memory_goal(bench),
    ]


def _ours(label: str, cell: AttentionCell) -> bool:
    """On our own kernels: what FlexAttention computes is a rival here."""
    return cell.label == label and not cell.rival and cell.backend != "flex"


def growth_exponent(points: Sequence[tuple[int, float]]) -> float:
    """Slope of log bytes over log n, by least squares."""
    logs = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return statistics.linear_regression(*logs).slope


def _flash_goal(bench: AttentionBench, window: int, sa: Choice) -> Goal:
    """Both spend a time on the same ``n (2 w - 1)`` pairs of the band, so rates are times."""
    name = "rate of SA over FlashAttention-3 on the two-sided band (w-1, w-1) (worst n)"

    def band(cell: AttentionCell) -> bool:
        return cell.method == "band" and cell.window == window

    goal = _ratio_goal(bench, name, 0.8, band, sa)
    versions = {cell.backend for cell in bench.cells if band(cell)}
    if goal.value is not None and not all(version.startswith(FLASH_3) for version in versions):
        detail = f"no FlashAttention-3 here; against {', '.join(sorted(versions))}: {goal.detail}"
        return unmeasured(name, 0.8, detail)
    return goal


def _ratio_goal(
    bench: AttentionBench,
    name: str,
    target: float,
    rival: Choice,
    ours: Choice,
    *,
    only: int | None = None,
    at_least: int = 0,
) -> Goal:
    """Time of the fastest rival over ours, at every length or at one."""
    ratios: list[tuple[float, str]] = []
    missing = ""
    lengths = [n for n in bench.lengths() if n >= at_least and only in (None, n)]
    for n in lengths:
        theirs, own = (fastest(filter(side, bench.where(n=n))) for side in (rival, ours))
        if theirs is None or own is None:
            missing = f"{'no rival' if theirs is None else 'none of ours'} was timed at n = {n}"
            continue
        ratio = (theirs.median_ms or math.nan) / (own.median_ms or math.nan)
        text = f"{n // 1024 or n}{'K' if n >= 1024 else ''} {number(ratio)} ({own.backend}"
        ratios.append((ratio, f"{text} over {theirs.backend})"))
    if not ratios:
        why = missing or f"n = {only or f'{at_least} and more'} was not reached"
        return unmeasured(name, target, why)
    worst = min(ratio for ratio, _ in ratios)
    detail = "; ".join(text for _, text in ratios) + (f"; {missing}" if missing else "")
    goal = judged(name, target, worst, detail, at_least=True)
    # A length at which one side gave no time must not turn into a goal met by what is left.
    return replace(goal, status=UNMEASURED) if missing and goal.status == MET else goal


def _memory_goal(bench: AttentionBench) -> Goal:
    """The growth of what is held beside inputs and result, of every backend but `reference`."""
    name = "memory: exponent of n by which the peak beside inputs and result grows (largest)"
    points: dict[str, list[tuple[int, float]]] = {}
    for cell in bench.cells:
        if cell.extra_bytes and not cell.rival and cell.backend != "reference":
            own = points.setdefault(f"{cell.label} on {cell.backend}", [])
            own.append((cell.n, float(cell.extra_bytes)))
    found = [(growth_exponent(own), label) for label, own in points.items() if len(own) >= 3]
    if not found:
        return unmeasured(name, LINEAR, "fewer than three lengths were measured")
    found.sort(reverse=True)
    detail = "; ".join(f"{label} {exponent:.2f}" for exponent, label in found)
    return judged(name, LINEAR, found[0][0], detail, at_least=False)
