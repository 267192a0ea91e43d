"""What full-size prefill is held to, judged from what was measured."""

from __future__ import annotations

from collections.abc import Callable

from sa_patch.benchmark.attention.goals import MET, MISSED, UNMEASURED, Goal
from sa_patch.benchmark.attention.tables import number
from sa_patch.benchmark.prefill.parts import CORE
from sa_patch.benchmark.prefill.record import Prefill, PrefillBench, best_full
from sa_patch.patterns import SA

JUDGED = str(SA(256))
SPEEDUPS = {32768: 1.4, 131072: 3.0}
MEMORY, DRAW_SHARE = 1.0, 0.02
Found = tuple[float, str] | str  # a value and how it came about, or why there is none


def judge_goals(bench: PrefillBench, model: str) -> list[Goal]:
    """The goals of one model, at the lengths that they name."""
    found = [
        _judge(
            bench,
            model,
            n,
            f"{model}: {JUDGED} over the best full attention at {n // 1024}K (times faster)",
            target,
            _speedup,
            at_least=True,
        )
        for n, target in SPEEDUPS.items()
    ]
    for n in SPEEDUPS:
        name = f"{model}: peak memory of {JUDGED} over stock's at {n // 1024}K"
        found.append(_judge(bench, model, n, name, MEMORY, _memory))
    for n in SPEEDUPS:
        name = f"{model}: drawing the permutation over a layer's attention at {n // 1024}K"
        found.append(_judge(bench, model, n, name, DRAW_SHARE, _draw_share))
    return found


def _judge(
    bench: PrefillBench,
    model: str,
    n: int,
    name: str,
    target: float,
    measure: Callable[[list[Prefill], Prefill], Found],
    *,
    at_least: bool = False,
) -> Goal:
    cells = bench.at(model, n)
    ours = fastest_sparse(cells, JUDGED)
    if ours is None:
        reasons = {one.reason for one in cells if one.label == JUDGED and one.reason}
        why = "; ".join(sorted(reasons)) or f"it was not timed at n = {n}"
        return Goal(name, target, None, UNMEASURED, why)
    found = measure(cells, ours)
    if isinstance(found, str):
        return Goal(name, target, None, UNMEASURED, found)
    value, detail = found
    met = value >= target if at_least else value <= target
    return Goal(name, target, value, MET if met else MISSED, detail)


def fastest_sparse(cells: list[Prefill], label: str) -> Prefill | None:
    """The timed cell of this pattern on its fastest backend."""
    timed = [one for one in cells if one.label == label and one.median is not None]
    return min(timed, key=lambda one: one.median or 0.0, default=None)


def _speedup(cells: list[Prefill], ours: Prefill) -> Found:
    rival = best_full(cells)
    if rival is None or rival.median is None or ours.median is None:
        return "no full attention was timed"
    detail = f"{number(ours.median)} s on {ours.backend}, {number(rival.median)} s {rival.name}"
    return rival.median / ours.median, detail


def _memory(cells: list[Prefill], ours: Prefill) -> Found:
    stock = next((one for one in cells if not one.backend), None)
    if stock is None or not stock.peak_bytes or ours.peak_bytes is None:
        return "the memory of one of them was not measured"
    detail = f"{ours.peak_bytes / 2**30:.2f} and {stock.peak_bytes / 2**30:.2f} GiB beside weights"
    return ours.peak_bytes / stock.peak_bytes, detail


def _draw_share(cells: list[Prefill], ours: Prefill) -> Found:
    layers = sum(ours.calls.values())
    if ours.draw_seconds is None or not layers or not ours.parts.get(CORE):
        return "drawing or attention was not timed"
    layer = ours.parts[CORE] / layers
    detail = f"{number(1e3 * ours.draw_seconds)} of {number(1e3 * layer)} ms"
    return ours.draw_seconds / layer, detail
