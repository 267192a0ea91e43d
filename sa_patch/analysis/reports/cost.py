"""Attention FLOPs against length: the paper's Figure 2, right (arXiv 2604.00754)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sa_patch.analysis.cost import Cost, check_lengths, measure_cost
from sa_patch.analysis.reports.figure_style import MARKERS, Sheet, colours_of, plain, sample
from sa_patch.analysis.reports.report import Report, as_json, short, shown
from sa_patch.patterns import Pattern


def cost_report(
    patterns: Sequence[Pattern], lengths: Sequence[int], head_dim: int, group: int
) -> Report:
    """FLOPs of each pattern at each length, expected and counted.

    Args:
        lengths: numbers of tokens, rising.
        head_dim: width of a head.
        group: query heads that share a KV head.

    Raises:
        UserError: for numbers out of range.
    """
    check_lengths(lengths, head_dim, group)
    costs = [measure_cost(p, lengths, head_dim=head_dim, group=group) for p in patterns]
    content = {
        "analysis": "cost",
        "lengths": list(lengths),
        "head_dim": head_dim,
        "group": group,
        "patterns": [
            {
                "pattern": str(cost.pattern),
                "expected_flops": as_json(cost.expected, 9),
                "counted_flops": as_json(cost.counted, 9),
                "exponent": as_json(cost.exponent()),
            }
            for cost in costs
        ],
    }
    columns = ("pattern", *(_size(length) for length in lengths), "grows as")
    rows = [
        (short(cost.pattern), *(shown(value / 1e9) for value in cost.expected), _growth(cost))
        for cost in costs
    ]
    note = "Expected GFLOPs of one layer with one head, and their growth to the longest length."
    return Report("cost", content, _draw(costs), columns, rows, note)


def _growth(cost: Cost) -> str:
    rise = cost.exponent()
    return "-" if rise is None else f"n^{rise:.2f}"


def _size(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"


def _line(place: int) -> str | tuple[int, tuple[float, float]]:
    """Every other one dashed: SA and a sliding window cost the same, and lie on each other."""
    return (0, (4, 2.5)) if place % 2 else "-"


def _draw(costs: Sequence[Cost]) -> Figure:
    patterns = [cost.pattern for cost in costs]
    handles: list[Line2D] = []
    for cost, colour in zip(costs, colours_of(patterns), strict=True):
        label = f"{short(cost.pattern)}  (grows as {_growth(cost)})"
        handles.append(sample(label, color=colour, linestyle=_line(len(handles))))
    handles.append(sample("counted", linestyle="none", marker="o", markersize=4))
    notes = [
        f"One layer, one head of {costs[0].head_dim}: 4 x head_dim for a visible key, 2 x head_dim "
        "for a candidate of a choice. Lines: closed form; points: keys counted in one draw. "
        "Exponents: between the two longest lengths.",
    ]
    sheet = Sheet("Attention FLOPs of a prefill", notes, handles, (1, 1), (6.2, 3.6))
    axes = sheet.panels[0]
    for place, (cost, colour) in enumerate(zip(costs, colours_of(patterns), strict=True)):
        axes.plot(cost.lengths, cost.expected, color=colour, linewidth=1.5, linestyle=_line(place))
        axes.plot(
            cost.lengths,
            cost.counted,
            color=colour,
            linestyle="none",
            marker=MARKERS[place % len(MARKERS)],
            markersize=4.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = costs[0].lengths
    axes.set_xticks(lengths, [_size(n) for n in lengths])
    plain(axes, "", "tokens n", "FLOPs")
    return sheet.figure
