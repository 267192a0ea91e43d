"""Methods that choose blocks by their means, from their papers."""

from __future__ import annotations

import numpy as np

from tests.rival_oracle.shared import (
    CERTAIN,
    Chosen,
    Floats,
    Seen,
    block_mean,
    by_blocks,
    mean_cosine,
    smallest_set,
    softmax,
)


def sparge(
    queries: Floats,
    keys: Floats,
    *,
    threshold: float,
    block_size: int,
    rows: int,
    similarity: float,
) -> Seen:
    """SpargeAttn (2502.18137, first stage): TopCdf over means, where blocks are self-similar."""
    n, width = queries.shape
    seen: list[set[int]] = []
    margins: list[float] = []
    for tile in range(-(-n // rows)):
        blocks = range(min(-(-n // block_size), (tile + 1) * rows // block_size))
        own = range(tile * rows // block_size, len(blocks))
        cosines = [mean_cosine(keys, block, block_size) for block in blocks]
        own_cosine = mean_cosine(queries, tile, rows)
        margin = min(abs(x - similarity) for x in (*cosines, own_cosine))
        told = [block for block in blocks if cosines[block] > similarity]
        chosen = set(blocks) - set(told)
        if own_cosine <= similarity:
            chosen = set(blocks)
        elif told:
            query = block_mean(queries, tile, rows)
            means = [block_mean(keys, block, block_size) for block in told]
            weights = softmax([float(query @ mean) / np.sqrt(width) for mean in means])
            order = sorted(range(len(told)), key=lambda place: (-weights[place], place))
            together = 0.0
            for rank, place in enumerate(order):
                together += weights[place]
                if len(told) > 1 and rank < len(told) - 1:
                    margin = min(margin, abs(together - threshold))
                if rank and together > threshold:
                    margin = min(margin, weights[order[rank - 1]] - weights[place])
                    break
                chosen.add(told[place])
        chosen |= set(own)
        for i in range(tile * rows, min(n, (tile + 1) * rows)):
            seen.append({j for j in range(i + 1) if j // block_size in chosen})
            margins.append(margin)
    return Seen(seen, margins)


def prism(
    queries: Floats, keys: Floats, *, threshold: float, block_size: int, high: float, low: float
) -> Seen:
    """Prism (2602.08426): the fewest blocks of each band, with temperatures by energy."""
    n, width = queries.shape
    half = width // 2
    blocks = range(-(-n // block_size))
    mean_queries = np.stack([block_mean(queries, block, block_size) for block in blocks])
    mean_keys = np.stack([block_mean(keys, block, block_size) for block in blocks])
    pairs = list(range(half))
    bands = []
    wide, narrow = (max(1, round(band * half)) for band in (high, low))
    for own in (pairs[:wide], pairs[half - narrow :]):
        places = [*own, *(place + half for place in own)]
        temperature = np.sqrt(len(places) / width)
        for x in (mean_queries, mean_keys):
            temperature *= np.sqrt((x[:, places] ** 2).mean()) / np.sqrt((x**2).mean())
        bands.append((places, np.sqrt(len(places)) * temperature))

    def choose(block: int) -> Chosen:
        chosen, margin = {0, block}, CERTAIN
        for places, scale in bands:
            query = mean_queries[block, places]
            scores = [float(query @ mean_keys[other, places]) / scale for other in range(block + 1)]
            own, by = smallest_set(softmax(scores), threshold)
            chosen |= own
            margin = min(margin, by)
        return chosen, margin

    return by_blocks(n, block_size, choose)


def flashprefill(
    queries: Floats,
    keys: Floats,
    *,
    alpha: float,
    block_size: int,
    sinks: int,
    local: int,
    last: int,
) -> Seen:
    """FlashPrefill (2603.06199): blocks with at least alpha times the largest sum."""
    n, width = queries.shape
    blocks = -(-n // block_size)

    def choose(block: int) -> Chosen:
        if block >= blocks - last:
            return set(range(block + 1)), CERTAIN
        rows = range(block * block_size, min(n, (block + 1) * block_size))
        sums = [0.0] * (block + 1)
        for other in range(block + 1):
            mean = block_mean(keys, other, block_size)
            for i in rows:
                if i >= (other + 1) * block_size - 1:
                    sums[other] += float(np.exp(queries[i] @ mean / np.sqrt(width)))
        needed = alpha * max(sums)
        chosen = {other for other in range(block + 1) if sums[other] >= needed}
        always = {other for other in range(block + 1) if other < sinks or block - other < local}
        margin = min((abs(x - needed) for x in sums if x < max(sums)), default=CERTAIN)
        return chosen | always, margin

    return by_blocks(n, block_size, choose)
