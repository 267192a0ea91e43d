"""Small worlds and mixing: what several layers together are as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sa_patch.analysis.figure_style import MARKERS, Sheet, colours_of, plain, sample
from sa_patch.analysis.paths import SmallWorld, measure_small_world
from sa_patch.analysis.report import Report, rounded, rounded_one, shown
from sa_patch.analysis.spectrum import Mixing, measure_mixing, ring_contraction
from sa_patch.analysis.stack import check_stack, stacked_graph
from sa_patch.patterns import SA, Pattern
from sa_patch.patterns.base import whole_number

_RANDOM = (0, (2, 1.5))


def graph_report(
    patterns: Sequence[Pattern], seq_len: int, layers: int, sampled: int, seed: int
) -> Report:
    """Paths, clustering and small-world coefficient of 1 to `layers` layers; gaps and mixing.

    Args:
        sampled: tokens from which paths are followed and around which triangles are counted.
        seed: of samples, random graphs, and random queries and keys.

    Raises:
        UserError: for what cannot be measured, before anything slow.
    """
    whole_number(seq_len, "n", 3)
    whole_number(sampled, "sample", 2)
    for pattern in patterns:
        check_stack(pattern, seq_len, layers)
    depths = [d for d in range(1, layers + 1) if d <= 4 or d in (6, 8, 12, 16, 24, 32) or d == layers]
    worlds = {
        pattern: [
            measure_small_world(
                stacked_graph(pattern, seq_len, depth, seed=seed), sample=sampled, seed=seed
            )
            for depth in depths
        ]
        for pattern in patterns
    }
    mixings = {p: measure_mixing(p, seq_len, layers, seed=seed) for p in patterns}
    content = {
        "analysis": "graph",
        "n": seq_len,
        "layers": layers,
        "sample": min(sampled, seq_len),
        "seed": seed,
        "patterns": [
            _record(p, depths, worlds[p], mixings[p], seq_len) for p in patterns
        ],
    }
    rows = [row for p in patterns for row in _rows(p, depths, worlds[p], mixings[p])]
    columns = (
        *("pattern", "layers", "mean path", "random", "clustering", "random", "small world"),
        *("spectral gap", "left of a difference", "from full attention"),
    )
    return Report("graph", content, _draw(worlds, mixings, depths, seq_len), columns, rows)


def _record(
    pattern: Pattern, depths: Sequence[int], worlds: Sequence[SmallWorld], mixing: Mixing, n: int
) -> dict[str, Any]:
    ring = isinstance(pattern, SA) and pattern.circular and 2 * pattern.window - 1 <= n
    contraction = mixing.contraction
    return {
        "pattern": str(pattern),
        "spectral_gap": rounded_one(mixing.gap, 9),
        "spectral_gap_closed_form": rounded_one(1 - ring_contraction(pattern, n), 9)
        if ring and isinstance(pattern, SA)
        else None,
        "contraction": None if contraction is None else rounded(contraction),
        "distance_from_full": rounded(mixing.distance),
        "stacked": [
            {"layers": depth, **asdict(world), "small_world": rounded_one(world.coefficient)}
            for depth, world in zip(depths, worlds, strict=True)
        ],
    }


def _rows(
    pattern: Pattern, depths: Sequence[int], worlds: Sequence[SmallWorld], mixing: Mixing
) -> list[tuple[str, ...]]:
    return [
        (
            str(pattern),
            str(depth),
            shown(world.path.mean),
            shown(world.random_path.mean),
            shown(world.clustering.mean),
            shown(world.random_clustering.mean),
            shown(world.coefficient),
            shown(mixing.gap) if depth == 1 else "",
            shown(None if mixing.contraction is None else mixing.contraction[depth]),
            shown(mixing.distance[depth]),
        )
        for depth, world in zip(depths, worlds, strict=True)
    ]


def _draw(
    worlds: dict[Pattern, list[SmallWorld]],
    mixings: dict[Pattern, Mixing],
    depths: Sequence[int],
    seq_len: int,
) -> Figure:
    patterns = list(worlds)
    handles = [
        sample(str(p), color=c, marker=m, markersize=4)
        for p, c, m in zip(patterns, colours_of(patterns), MARKERS * len(patterns), strict=False)
    ]
    handles.append(sample("random graph of equal density", linestyle=_RANDOM))
    notes = [
        f"n = {seq_len:,}. Top: two tokens are joined if one sees the other in any of the layers; "
        "bars: 95% over sampled tokens. Below left: the largest factor by which that many layers of "
        "uniform two-sided attention leave a difference between tokens (not defined where degrees "
        "differ between layers). Below right: total variation distance between what the last query "
        "takes in through causal layers of the pattern and through as many of full attention, both "
        "uniform over visible keys.",
    ]
    sheet = Sheet("The graph of several layers", notes, handles, (2, 2), (4.3, 2.7))
    path, clustering, contraction, distance = sheet.panels
    for place, pattern in enumerate(patterns):
        look: dict[str, Any] = {
            "color": colours_of(patterns)[place],
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.4,
        }
        for axes, own, rival in (
            (path, "path", "random_path"),
            (clustering, "clustering", "random_clustering"),
        ):
            values = [getattr(world, own) for world in worlds[pattern]]
            axes.errorbar(
                depths, [v.mean for v in values], [v.half for v in values], capsize=2, **look
            )
            random = [getattr(world, rival).mean for world in worlds[pattern]]
            axes.plot(depths, random, color=look["color"], linewidth=1.1, linestyle=_RANDOM)
        mixing = mixings[pattern]
        if mixing.contraction is not None:
            contraction.plot(np.arange(len(mixing.contraction)), mixing.contraction, **look)
        distance.plot(np.arange(len(mixing.distance)), mixing.distance, **look)
    path.set_yscale("log")
    path.set_yticks([1.5, 2, 3, 5, 10, 20, 50], ["1.5", "2", "3", "5", "10", "20", "50"])
    path.minorticks_off()
    contraction.set_yscale("log")
    plain(path, "mean shortest path", "layers joined", "hops")
    plain(clustering, "clustering coefficient", "layers joined", "")
    plain(contraction, "what mixing leaves", "layers", "largest factor")
    plain(distance, "distance from full attention", "causal layers", "total variation")
    return sheet.figure
