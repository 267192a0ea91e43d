"""Methods of windows, columns and diagonals, from their papers."""

from __future__ import annotations

import numpy as np

from tests.rival_oracle.shared import (
    CERTAIN,
    Floats,
    Seen,
    attention_row,
    best,
    block_mean,
    by_blocks,
    in_view,
    smallest_set,
)


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
    """MInference (2407.02490), diagonals in squares as its kernel reads them."""
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


def flexprefill(
    queries: Floats, keys: Floats, *, gamma: float, block_size: int, tau: float, minimum: int
) -> Seen:
    """FlexPrefill (2502.20766, algorithms 1 to 4), in blocks as its kernel."""
    n, width = queries.shape
    blocks = -(-n // block_size)
    last = range(max(0, n - block_size), n)
    columns, distances = [0.0] * blocks, [0.0] * blocks
    for i in last:
        for j, weight in enumerate(attention_row(i, queries, keys)):
            columns[j // block_size] += weight / len(last)
            distances[(i - j) // block_size] += weight / len(last)

    def score(query: Floats, block: int) -> float:
        return float(query @ block_mean(keys, block, block_size)) / np.sqrt(width)

    mean_query = queries[last.start :].mean(axis=0)
    estimate = np.exp([score(mean_query, block) for block in range(blocks)])
    estimate = estimate / estimate.sum()
    divergence = 0.0
    for p, q in zip(estimate, columns, strict=True):
        middle = (p + q) / 2
        divergence += 0.5 * p * np.log(p / middle) + 0.5 * q * np.log(q / middle)
    divergence = max(0.0, divergence)
    margin = abs(np.sqrt(divergence) - tau)
    seen_blocks: list[set[int]] = [{0, block} for block in range(blocks)]
    if np.sqrt(divergence) < tau:
        weights, places = [], []
        for block in range(blocks):
            query = block_mean(queries, block, block_size)
            row = np.exp([score(query, other) for other in range(block + 1)])
            weights += list(row / row.sum())
            places += [(block, other) for other in range(block + 1)]
        chosen, other_margin = smallest_set(weights, gamma)
        margin = min(margin, other_margin)
        for place in chosen:
            seen_blocks[places[place][0]].add(places[place][1])
    else:
        lines = []
        for sums in (columns, distances):
            rest = sums[1:]
            chosen, other_margin = in_view(sums, {0}, 0, gamma)
            chosen |= {1 + place for place in best(rest, minimum - 1)[0]}
            margin = min(margin, other_margin, best(rest, minimum - 1)[1])
            lines.append(chosen)
        for block in range(blocks):
            own = {x for x in lines[0] if x <= block}
            seen_blocks[block] |= own | {block - x for x in lines[1] if x <= block}
    return by_blocks(n, block_size, lambda block: (seen_blocks[block], margin))
