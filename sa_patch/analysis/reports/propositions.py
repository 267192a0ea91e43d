"""Propositions of arXiv 2604.00754, measured beside predicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_patch.analysis.propositions import Check, check_propositions
from sa_patch.analysis.reports.figure_style import Sheet, plain, sample
from sa_patch.analysis.reports.report import Report, as_json, shown
from sa_patch.figures.colours import COLOURS, OTHER_COLOURS


def propositions_report(
    seq_len: int, windows: Sequence[int], draws: int, coverage_draws: int
) -> Report:
    """Check every statement at each window; see `check_propositions`.

    Raises:
        UserError: for numbers out of range, before anything slow.
    """
    checks = check_propositions(seq_len, windows, draws, coverage_draws)
    content = {
        "analysis": "propositions",
        "n": seq_len,
        "windows": list(windows),
        "agree": sum(check.agrees for check in checks),
        "checks": [{**as_json(check), "agrees": check.agrees} for check in checks],
    }
    rows = [
        (
            check.what,
            str(check.window),
            shown(check.predicted, 4),
            shown(check.measured, 4),
            f"{shown(check.low, 4)} to {shown(check.high, 4)}",
            "yes" if check.agrees else "NO",
        )
        for check in checks
    ]
    columns = ("statement", "w", "predicted", "measured", "interval", "agrees")
    note = (
        f"{content['agree']} of {len(checks)} predictions lie within their intervals, "
        "which hold all together with 95%."
    )
    return Report("propositions", content, _draw(checks, seq_len), columns, rows, note)


def _draw(checks: Sequence[Check], seq_len: int) -> Figure:
    first, second = COLOURS["sa"], OTHER_COLOURS[0]
    handles = [
        sample("predicted", linestyle="-"),
        sample("measured, with interval", linestyle="none", marker="o", markersize=4),
        sample("not causal (layers), last query (bias, variance)", color=first),
        sample("causal (layers), query n / 4 (bias, variance)", color=second),
    ]
    notes = [
        f"SA at n = {seq_len:,}. Intervals hold all together with 95% (each with "
        f"{checks[0].confidence:.2%}). Bias and variance, over permutations, are those of the mean "
        "of fixed normal values over visible keys, against uniform attention over all earlier "
        "ones.",
    ]
    title = "What theory predicts of stochastic attention"
    sheet = Sheet(title, notes, handles, (2, 2), (4.3, 2.7))
    pair, depth, bias, variance = sheet.panels
    for axes, begins, title, y in (
        (pair, "P(pair", "chance that a pair is visible", ""),
        (depth, "layers", "layers to full coverage", "layers"),
        (bias, "bias", "bias against uniform attention", "size of the bias"),
        (variance, "variance", "variance around uniform attention", ""),
    ):
        kinds = list(dict.fromkeys(c.what for c in checks if c.what.startswith(begins)))
        for kind, colour in zip(kinds, (first, second), strict=False):
            _series(axes, [c for c in checks if c.what == kind], colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        windows = sorted({check.window for check in checks})
        axes.set_xticks(windows, [str(window) for window in windows])
        plain(axes, title, "window w", y)
    return sheet.figure


def _series(axes: Axes, checks: Sequence[Check], colour: str) -> None:
    """A bias is drawn by its size: where the prediction is negative the interval is turned over."""
    sign = np.array([-1.0 if check.predicted < 0 else 1.0 for check in checks])
    windows = [check.window for check in checks]
    measured = sign * np.array([check.measured for check in checks])
    half = np.array([[c.measured - c.low, c.high - c.measured] for c in checks]).T
    half = np.where(sign > 0, half, half[::-1])
    predicted = sign * np.array([check.predicted for check in checks])
    axes.plot(windows, predicted, color=colour, linewidth=1.4)
    axes.errorbar(windows, measured, half, color=colour, fmt="o", markersize=4, capsize=2)
