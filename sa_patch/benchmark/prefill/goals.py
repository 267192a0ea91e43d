"""What full-size prefill is held to, judged from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sa_patch.benchmark.goals import Goal, judged, unmeasured
from sa_patch.benchmark.prefill.parts import CORE
from sa_patch.benchmark.prefill.record import Prefill, PrefillBench
from sa_patch.benchmark.record import fastest
from sa_patch.benchmark.tables import number
from sa_patch.patterns import SA

JUDGED = str(SA(256))
SPEEDUPS = {32768: 1.4, 131072: 3.0}
MEMORY, DRAW_SHARE = 1.0, 0.02
Found = tuple[float, str] | str  # a value and how it came about, or why there is none


def judge_goals(bench: PrefillBench, model: str) -> list[Goal]:
    """The goals of one model, at the lengths that they name."""
    found = []
    for n, name, target, measure in _goals():
        cells = bench.where(model=model, n=n)
        own = [one for one in cells if one.label == JUDGED]
        name = f"{model}: {name}"
        result: Found
        if (ours := fastest(own)) is not None:
            result = measure(cells, ours)
        else:
            result = "; ".join(sorted({one.reason for one in own if one.reason}))
            result = result or f"it was not timed at n = {n}"
        if isinstance(result, str):
            found.append(unmeasured(name, target, result))
        else:
            found.append(judged(name, target, *result, at_least=measure is _speedup))
    return found


def _goals() -> Iterator[tuple[int, str, float, Callable[[list[Prefill], Prefill], Found]]]:
    for n, target in SPEEDUPS.items():
        name = f"{JUDGED} over the best full attention at {n // 1024}K (times faster)"
        yield n, name, target, _speedup
    for n in SPEEDUPS:
        yield n, f"peak memory of {JUDGED} over stock's at {n // 1024}K", MEMORY, _memory
    for n in SPEEDUPS:
        name = f"drawing the permutation over a layer's attention at {n // 1024}K"
        yield n, name, DRAW_SHARE, _draw_share


def _speedup(cells: list[Prefill], ours: Prefill) -> Found:
    rival = fastest(one for one in cells if one.full)
    if rival is None or rival.median is None or ours.median is None:
        return "no full attention was timed"
    detail = f"{number(ours.median)} s on {ours.backend}, {number(rival.median)} s {rival.name}"
    return rival.median / ours.median, detail


def _memory(cells: list[Prefill], ours: Prefill) -> Found:
    stock = next((one for one in cells if not one.backend), None)
    if stock is None or not stock.extra_bytes or ours.extra_bytes is None:
        return "the memory of one of them was not measured"
    gib = f"{ours.extra_bytes / 2**30:.2f} and {stock.extra_bytes / 2**30:.2f} GiB"
    return ours.extra_bytes / stock.extra_bytes, f"{gib} beside weights"


def _draw_share(cells: list[Prefill], ours: Prefill) -> Found:
    layers = sum(ours.calls.values())
    if ours.draw_seconds is None or not layers or not ours.parts.get(CORE):
        return "drawing or attention was not timed"
    layer = ours.parts[CORE] / layers
    detail = f"{number(1e3 * ours.draw_seconds)} of {number(1e3 * layer)} ms"
    return ours.draw_seconds / layer, detail
