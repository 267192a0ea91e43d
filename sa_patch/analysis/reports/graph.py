"""Small worlds and mixing: what several layers together are as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sa_patch.analysis.graphs.small_world import SmallWorld, measure_small_world
from sa_patch.analysis.graphs.spectrum import Mixing, measure_mixing, ring_contraction
from sa_patch.analysis.graphs.stacked_layers import check_stack, stacked_graphs
from sa_patch.analysis.reports.figure_style import MARKERS, Sheet, colours_of, plain, sample
from sa_patch.analysis.reports.report import Report, as_json, short, shown
from sa_patch.analysis.seeds import check_seed
from sa_patch.patterns import SA, Pattern
from sa_patch.patterns.base import whole_number

# Depths that are measured beside the first four and the last.
_DEPTHS = (6, 8, 12, 16, 24, 32)
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
    check_graph_report(patterns, seq_len, layers, sampled, seed)
    depths = [d for d in range(1, layers + 1) if d <= 4 or d in _DEPTHS or d == layers]
    worlds = {p: _worlds(p, seq_len, layers, depths, sampled, seed) for p in patterns}
    mixings = {p: measure_mixing(p, seq_len, layers, seed=seed) for p in patterns}
    content = {
        "analysis": "graph",
        "n": seq_len,
        "layers": layers,
        "sample": min(sampled, seq_len),
        "seed": seed,
        "patterns": [_record(p, depths, worlds[p], mixings[p], seq_len) for p in patterns],
    }
    rows = [row for p in patterns for row in _rows(p, depths, worlds[p], mixings[p])]
    columns = (
        *("pattern", "layers", "path", "random", "clustering", "random", "small world"),
        *("gap", "left", "from full"),
    )
    note = (
        "path: mean shortest path. random: a random graph with as many edges. small world: above 1 "
        "for a small-world graph, a dash where a graph is not in one piece. gap: spectral gap of a "
        "layer. left, from full: what mixing leaves, and the distance from full attention, as in "
        "the figure."
    )
    figure = _draw(worlds, mixings, depths, seq_len)
    return Report("graph", content, figure, columns, rows, note)


def check_graph_report(
    patterns: Sequence[Pattern], seq_len: int, layers: int, sampled: int, seed: int
) -> None:
    """Refuse what `graph_report` could not measure.

    Raises:
        UserError: for numbers out of range, or more pairs than are held in memory.
    """
    whole_number(seq_len, "n", 3)
    whole_number(sampled, "sample", 2)
    check_seed(seed)
    for pattern in patterns:
        check_stack(pattern, seq_len, layers)


def _worlds(
    pattern: Pattern, n: int, layers: int, depths: Sequence[int], sampled: int, seed: int
) -> list[SmallWorld]:
    found: list[SmallWorld] = []
    measured = None
    for depth, graph in enumerate(stacked_graphs(pattern, n, layers, seed=seed), start=1):
        if depth in depths:
            if graph is not measured:
                world = measure_small_world(graph, sample=sampled, seed=seed)
                measured = graph
            found.append(world)
    return found


def _record(
    pattern: Pattern, depths: Sequence[int], worlds: Sequence[SmallWorld], mixing: Mixing, n: int
) -> dict[str, Any]:
    ring = isinstance(pattern, SA) and pattern.circular and 2 * pattern.window - 1 <= n
    closed = 1 - ring_contraction(pattern, n) if ring and isinstance(pattern, SA) else None
    stacked = [
        {"layers": depth, **as_json(world), "small_world": as_json(world.coefficient)}
        for depth, world in zip(depths, worlds, strict=True)
    ]
    return {
        "pattern": str(pattern),
        "spectral_gap": as_json(mixing.gap, 9),
        "spectral_gap_closed_form": as_json(closed, 9),
        "contraction": as_json(mixing.contraction),
        "distance_from_full": as_json(mixing.distance),
        "stacked": stacked,
    }


def _rows(
    pattern: Pattern, depths: Sequence[int], worlds: Sequence[SmallWorld], mixing: Mixing
) -> list[tuple[str, ...]]:
    return [
        (
            short(pattern),
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
        sample(short(p), color=c, marker=m, markersize=4)
        for p, c, m in zip(patterns, colours_of(patterns), MARKERS * len(patterns), strict=False)
    ]
    handles.append(sample("random graph of equal density", linestyle=_RANDOM))
    notes = [
        f"n = {seq_len:,}. Top: two tokens are joined if one sees the other in any of the layers; "
        "bars: 95% over sampled tokens. Below left: the largest factor by which that many layers "
        "of uniform two-sided attention leave a difference between tokens (not drawn below 1e-7; "
        "not defined where the number of neighbours differs between layers). Below right: total "
        "variation distance between what the last query takes in through causal layers of the "
        "pattern and through as many of full attention, both uniform over visible keys.",
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
            left = np.where(mixing.contraction > 0, mixing.contraction, np.nan)
            contraction.plot(np.arange(len(left)), left, **look)
        distance.plot(np.arange(len(mixing.distance)), mixing.distance, **look)
    path.set_yscale("log")
    path.set_yticks([1.5, 2, 3, 5, 10, 20, 50], ["1.5", "2", "3", "5", "10", "20", "50"])
    path.minorticks_off()
    contraction.set_yscale("log")
    contraction.set_ylim(top=2)
    plain(path, "mean shortest path", "layers joined", "hops")
    plain(clustering, "clustering coefficient", "layers joined", "")
    plain(contraction, "what mixing leaves", "layers", "largest factor")
    plain(distance, "distance from full attention", "causal layers", "total variation")
    return sheet.figure
