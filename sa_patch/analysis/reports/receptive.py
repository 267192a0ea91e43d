"""Receptive fields against depth: the paper's Figure 2, left (arXiv 2604.00754)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_patch.analysis.coverage import (
    Prediction,
    expected_layers_to_all,
    log_coverage,
    predict,
)
from sa_patch.analysis.graphs.visibility import check_visibility, has_two_sides
from sa_patch.analysis.propositions import Check, coverage_depth
from sa_patch.analysis.receptive_field import (
    ReceptiveField,
    check_receptive_field,
    measure_receptive_field,
)
from sa_patch.analysis.reports.figure_style import Sheet, colours_of, plain, sample, whole_ticks
from sa_patch.analysis.reports.report import Report, as_json, short, shown
from sa_patch.analysis.seeds import check_seed
from sa_patch.errors import UserError
from sa_patch.patterns import SA, Pattern
from sa_patch.patterns.base import whole_number

_SHARES = (0.5, 0.9, 0.99, 1.0)
_AVERAGE = (0, (2, 1.5))


@dataclass(frozen=True)
class _Found:
    """One curve with what was predicted of it, None where nothing is.

    `drawn` is the mean number of layers to everything over several draws, of stochastic attention.
    """

    field: ReceptiveField
    predicted: Prediction | None
    predicted_to_all: float | None
    drawn: Check | None


def receptive_report(
    patterns: Sequence[Pattern], seq_len: int, depth: int, queries: int, draws: int, seed: int
) -> Report:
    """Measure every pattern, causal and, where it has such a form, not; and set predictions beside.

    Args:
        depth: layers at most.
        queries: how many the average is taken over; all if there are no more.
        draws: of stochastic attention, over which layers to everything are averaged; 0 for none.
        seed: of the sample of queries, and of random queries and keys.

    Raises:
        UserError: for what cannot be measured, before anything slow.
    """
    check_receptive_report(patterns, seq_len, depth, queries, draws, seed)
    sampled = None if queries >= seq_len else queries
    sides = [(p, True) for p in patterns] + [(p, False) for p in patterns if has_two_sides(p)]
    found = [_measure(p, seq_len, depth, causal, sampled, draws, seed) for p, causal in sides]
    content = {
        "analysis": "receptive",
        "n": seq_len,
        "depth": depth,
        "queries": min(queries, seq_len),
        "draws": draws,
        "seed": seed,
        "patterns": [_record(one) for one in found],
    }
    columns = (
        *("pattern", "causal", "50%", "90%", "99%", "all"),
        *(f"{draws} draws" if draws else "draws", "predicted", "log_w n", "reached"),
    )
    note = (
        "Layers until the last query's receptive field is that share of what full attention sees, "
        "and to all of it on average over draws (95%) and as predicted. A dash: not within the "
        "depth, not drawn, or no closed form."
    )
    rows = [_row(one) for one in found]
    return Report("receptive", content, _draw(found, patterns, seq_len), columns, rows, note)


def check_receptive_report(
    patterns: Sequence[Pattern], seq_len: int, depth: int, queries: int, draws: int, seed: int
) -> None:
    """Refuse what `receptive_report` could not measure.

    Raises:
        UserError: for numbers out of range, or a pattern that cannot be built at this length.
    """
    check_seed(seed)
    whole_number(draws, "draws", 0)
    if 0 < draws < 10:
        raise UserError(f"draws must be 0, or at least 10 for an interval, got {draws}")
    sampled = None if queries >= seq_len else queries
    for pattern in patterns:
        check_receptive_field(pattern, seq_len, depth, queries=sampled)
        if has_two_sides(pattern):
            check_visibility(pattern, seq_len, causal=False)


def _measure(
    pattern: Pattern,
    n: int,
    depth: int,
    causal: bool,
    queries: int | None,
    draws: int,
    seed: int,
) -> _Found:
    field = measure_receptive_field(pattern, n, depth, causal=causal, queries=queries, seed=seed)
    said = predict(pattern, n, field.depth, causal=causal)
    # The paper's bounds are far below ten times what was asked to be looked at.
    to_all = expected_layers_to_all(pattern, n, causal=causal, limit=10 * depth)
    drawn = None
    if draws and to_all is not None and isinstance(pattern, SA) and not pattern.saturated(n):
        drawn = coverage_depth(n, pattern.window, draws, causal=causal)
    return _Found(field, said, to_all, drawn)


def _record(found: _Found) -> Any:
    field, said = found.field, found.predicted
    mean, half = field.average()
    layers, reached = field.mean_layers()
    return as_json(
        {
            "pattern": field.pattern,
            "causal": field.causal,
            "last_query": field.last,
            "average": mean,
            "average_half_width_95": half,
            "predicted_last_query": None if said is None else said.shares,
            "prediction_is_exact": None if said is None else said.exact,
            "layers_to": {str(share): field.layers_to(share) for share in _SHARES},
            "layers_to_all_every_query": field.layers_for_all(),
            "predicted_layers_to_all": found.predicted_to_all,
            "layers_to_all_over_draws": found.drawn,
            "log_w_n": _log_w_n(field),
            "mean_layers_to_a_token": layers,
            "reached": reached,
        }
    )


def _row(found: _Found) -> tuple[str, ...]:
    field, drawn = found.field, found.drawn
    return (
        short(field.pattern),
        "yes" if field.causal else "no",
        *(shown(field.layers_to(share)) for share in _SHARES),
        "-"
        if drawn is None
        else f"{shown(drawn.measured)} ± {shown(drawn.high - drawn.measured, 2)}",
        shown(found.predicted_to_all),
        shown(_log_w_n(field)),
        f"{field.last[-1]:.1%}",
    )


def _log_w_n(field: ReceptiveField) -> float | None:
    """What the paper says of SA."""
    pattern = field.pattern
    return log_coverage(field.seq_len, pattern.window) if isinstance(pattern, SA) else None


def _draw(found: Sequence[_Found], patterns: Sequence[Pattern], seq_len: int) -> Figure:
    colours = dict(zip(patterns, colours_of(patterns), strict=True))
    sides = list(dict.fromkeys(one.field.causal for one in found))
    handles = [sample(short(pattern), color=colour) for pattern, colour in colours.items()]
    handles += [
        sample("last query", linestyle="-"),
        sample("mean over queries", linestyle=_AVERAGE),
        sample("predicted, last query", linestyle="none", marker="x", markersize=5),
    ]
    notes = [
        f"n = {seq_len:,}. A receptive field is what a query is reached by through that many "
        "layers, as a share of what full attention sees. One draw of each random pattern; bands: "
        "95% for the choice of queries. A curve ends where every query of the sample sees all.",
    ]
    title = "Receptive field against depth"
    sheet = Sheet(title, notes, handles, (1, len(sides)), (4.4, 3.3))
    for axes, causal in zip(sheet.panels, sides, strict=True):
        own = [one for one in found if one.field.causal == causal]
        for one in own:
            _curve(axes, one, colours[one.field.pattern])
        plain(axes, "causal" if causal else "not causal", "layers", "receptive field, %")
        deepest = max(one.field.depth for one in own)
        axes.set_xscale("log")
        axes.set_xlim(0.9, max(deepest, 2) * 1.15)
        axes.set_ylim(-3, 104)
        whole_ticks(axes, deepest)
    return sheet.figure


def _curve(axes: Axes, found: _Found, colour: str) -> None:
    field = found.field
    mean, half = field.average()
    layers = np.arange(1, field.depth + 1)
    # One layer alone draws no line.
    marker = "o" if len(layers) == 1 else ""
    axes.plot(layers, 100 * field.last[1:], color=colour, linewidth=1.6, marker=marker)
    axes.plot(layers, 100 * mean[1:], color=colour, linewidth=1.3, linestyle=_AVERAGE)
    low, high = 100 * (mean - half)[1:], 100 * (mean + half)[1:]
    axes.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
    if found.predicted is not None and len(layers):
        # About as many marks in each part of a logarithmic axis.
        places = np.unique(np.geomspace(1, field.depth, 14).round().astype(int))
        shares = 100 * found.predicted.shares[places]
        axes.plot(places, shares, color=colour, linestyle="none", marker="x", markersize=5)
