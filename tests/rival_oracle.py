"""The methods of `sa_patch.patterns.rivals` written a second time, from their papers.

As in `tests/oracle.py` everything is float64, NumPy and plain loops, and nothing comes from
`sa_patch`. A function takes the queries of one head, its keys and the method's own parameters, and
returns what every query sees, with the margin by which its choice was made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CERTAIN = float("inf")


@dataclass
class Seen:
    """keys: for each query a set; margin: for each query how far its choice was from another."""

    keys: list[set[int]]
    margin: list[float]


def power(queries: Floats, keys: Floats, *, window: int, block_size: int) -> Seen:
    """PowerAttention (2503.03588, section 3.3): the window, own block, and blocks 2^k before it."""
    seen: list[set[int]] = []
    for i in range(len(queries)):
        own = i // block_size
        blocks = {own}
        apart = 1
        while apart <= own:
            blocks.add(own - apart)
            apart *= 2
        in_blocks = {j for j in range(i + 1) if j // block_size in blocks}
        seen.append(in_blocks | set(range(max(0, i - window + 1), i + 1)))
    return Seen(seen, [CERTAIN] * len(queries))


def attention_row(i: int, queries: Floats, keys: Floats) -> Floats:
    """Softmax weights of query i over the keys up to itself, scaled by 1 / sqrt(head_dim)."""
    scores = keys[: i + 1] @ queries[i] / np.sqrt(queries.shape[1])
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def best(scores: list[float], count: int) -> tuple[set[int], float]:
    """Places of the largest scores, the earlier of equal ones; and by how much the last won."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    chosen, others = order[:count], order[count:]
    if not chosen or not others:
        return set(chosen), CERTAIN
    return set(chosen), scores[chosen[-1]] - scores[others[0]]


def vertical_slash(
    queries: Floats,
    keys: Floats,
    *,
    vertical: int,
    slash: int,
    last: int,
    sinks: int,
    local: int,
    block_size: int,
) -> Seen:
    """MInference (2407.02490, algorithm 2), diagonals in squares as its kernel reads them."""
    n = len(queries)
    columns, distances = [0.0] * n, [0.0] * n
    for i in range(max(0, n - last), n):
        for j, weight in enumerate(attention_row(i, queries, keys)):
            columns[j] += weight
            distances[i - j] += weight
    for sums, certain in ((columns, sinks), (distances, local)):
        for place in range(min(certain, n)):
            sums[place] = 1e9 - place
    chosen_columns, margin = best(columns, vertical)
    chosen_distances, other_margin = best(distances, slash)
    seen = []
    for i in range(n):
        first = i // block_size * block_size
        own = {j for j in chosen_columns if j <= i}
        for distance in chosen_distances:
            square = range(first - distance, first - distance + block_size)
            own.update(j for j in square if 0 <= j <= i)
        seen.append(own)
    return Seen(seen, [min(margin, other_margin)] * n)


METHODS: dict[str, Callable[..., Seen]] = {"power": power, "vertical_slash": vertical_slash}


def visible(method: str, queries: Floats, keys: Floats, arguments: dict[str, Any]) -> Seen:
    """queries: [n, head_dim] of one head; keys: [n, head_dim]."""
    seen = METHODS[method](queries, keys, **arguments)
    for i, own in enumerate(seen.keys):
        assert own and max(own) <= i, "the oracle itself looks ahead"
    return seen
