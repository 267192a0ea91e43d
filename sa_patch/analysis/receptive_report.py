"""Receptive fields against depth: the paper's Figure 2, left (arXiv 2604.00754)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sa_patch.analysis.coverage import expected_layers_to_all, log_coverage, predict
from sa_patch.analysis.figure_style import FONT, Sheet, colours_of, plain, sample, whole_ticks
from sa_patch.analysis.receptive import (
    ReceptiveField,
    check_receptive_field,
    measure_receptive_field,
)
from sa_patch.analysis.report import Report, rounded, rounded_one, shown
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, Full, Pattern, Union

_SHARES = (0.5, 0.9, 0.99, 1.0)


def has_two_sides(pattern: Pattern) -> bool:
    """Whether a pattern has a non-causal form."""
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    return all(isinstance(part, (Full, SWA, SA)) for part in parts)


def receptive_report(
    patterns: Sequence[Pattern], seq_len: int, depth: int, queries: int, seed: int
) -> Report:
    """Measure every pattern, causal and, where it has such a form, not; and set predictions beside.

    Args:
        depth: layers at most.
        queries: how many the average is taken over; all if there are no more.
        seed: of the sample of queries, and of random queries and keys.

    Raises:
        UserError: for what cannot be measured, before anything slow.
    """
    sampled = None if queries >= seq_len else queries
    for pattern in patterns:
        check_receptive_field(pattern, seq_len, depth, queries=sampled)
    asked = [(p, causal) for causal in (True, False) for p in patterns if causal or has_two_sides(p)]
    fields = [
        measure_receptive_field(p, seq_len, depth, causal=causal, queries=sampled, seed=seed)
        for p, causal in asked
    ]
    found = [_record(field, depth) for field in fields]
    content = {
        "analysis": "receptive-field",
        "n": seq_len,
        "depth": depth,
        "queries": min(queries, seq_len),
        "seed": seed,
        "patterns": found,
    }
    return Report(
        "receptive-field", content, _draw(fields, patterns, seq_len, depth), *_table(found)
    )


def _record(field: ReceptiveField, depth: int) -> dict[str, Any]:
    pattern, n, causal = field.pattern, field.seq_len, field.causal
    mean, half = field.average()
    said = predict(pattern, n, field.depth, causal=causal)
    layers, reached = field.mean_layers()
    record = {
        "pattern": str(pattern),
        "causal": causal,
        "last_query": rounded(field.last),
        "average": rounded(mean),
        "average_half_width_95": rounded(half),
        "predicted_last_query": None if said is None else rounded(said.shares),
        "layers_to": {str(share): field.layers_to(share) for share in _SHARES},
        "layers_to_all_every_query": field.layers_for_all(),
        "predicted_layers_to_all": rounded_one(expected_layers_to_all(pattern, n, causal=causal)),
        "mean_layers_to_a_token": rounded_one(layers),
        "reached": rounded_one(reached),
    }
    if isinstance(pattern, SA):
        record["log_w_n"] = rounded_one(log_coverage(n, pattern.window))
    return record


def _table(found: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = ("pattern", "causal", "layers to 50%", "90%", "99%", "all", "predicted", "of its past")
    rows = [
        (
            one["pattern"],
            "yes" if one["causal"] else "no",
            *(shown(one["layers_to"][str(share)]) for share in _SHARES),
            shown(one["predicted_layers_to_all"]),
            f"{one['reached']:.1%}",
        )
        for one in found
    ]
    return columns, rows


def _draw(
    fields: Sequence[ReceptiveField], patterns: Sequence[Pattern], seq_len: int, depth: int
) -> Any:
    colours = dict(zip(patterns, colours_of(patterns), strict=True))
    sides = [True, False] if any(not field.causal for field in fields) else [True]
    handles = [sample(str(pattern), color=colour) for pattern, colour in colours.items()]
    handles += [
        sample("last query", linestyle="-"),
        sample("mean over queries", linestyle=(0, (2, 1.5))),
        sample("predicted, last query", linestyle="none", marker="x", markersize=5),
    ]
    notes = [
        f"n = {seq_len:,}. A receptive field is what a query is reached by through d layers, as a "
        "share of what full attention sees. One draw of each random pattern; bands: 95% for the "
        "choice of queries.",
    ]
    sheet = Sheet(
        "Receptive field against depth", notes, handles, (1, len(sides)), (4.4, 3.3)
    )
    for axes, causal in zip(sheet.panels, sides, strict=True):
        own = [field for field in fields if field.causal == causal]
        for field in own:
            _curve(axes, field, colours[field.pattern], depth)
        plain(axes, "causal" if causal else "not causal", "layers", "receptive field, %")
        axes.set_xscale("log")
        axes.set_xlim(0.9, max(max(field.depth for field in own), 2) * 1.15)
        axes.set_ylim(-3, 104)
        whole_ticks(axes, max(field.depth for field in own))
        if not own:
            axes.text(0.5, 0.5, "no pattern has such a form", ha="center", fontsize=FONT)
    return sheet.figure


def _curve(axes: Axes, field: ReceptiveField, colour: str, depth: int) -> None:
    mean, half = field.average()
    layers = np.arange(1, field.depth + 1)
    # A curve that has reached everything ends there.
    axes.plot(layers, 100 * field.last[1:], color=colour, linewidth=1.6)
    axes.plot(layers, 100 * mean[1:], color=colour, linewidth=1.3, linestyle=(0, (2, 1.5)))
    axes.fill_between(
        layers, 100 * (mean - half)[1:], 100 * (mean + half)[1:], color=colour, alpha=0.15, lw=0
    )
    said = predict(field.pattern, field.seq_len, field.depth, causal=field.causal)
    if said is not None:
        # About as many marks in each part of a logarithmic axis.
        places = np.unique(np.geomspace(1, field.depth, 14).round().astype(int))
        axes.plot(
            places,
            100 * said.shares[places],
            color=colour,
            linestyle="none",
            marker="x",
            markersize=5,
        )


def check_windowed(patterns: Sequence[Pattern]) -> None:
    """Raises ``UserError`` where a pattern is named twice: its curves would cover each other."""
    if len(set(patterns)) < len(patterns):
        raise UserError("each pattern is named once")
