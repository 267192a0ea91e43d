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


Chosen = tuple[set[int], float]
"""Blocks, and the margin by which they were chosen."""


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


def in_view(mass: list[float], certain: set[int], topk: int, threshold: float) -> Chosen:
    """Blocks in view by a number of them, or by their share of the mass; and the margin."""
    others = [block for block in range(len(mass)) if block not in certain]
    if topk:
        wanted = max(0, topk - len(certain))
        chosen, margin = best([mass[block] for block in others], wanted)
        return certain | {others[place] for place in chosen}, margin
    chosen, needed = set(certain), threshold * sum(mass)
    margin = CERTAIN
    covered = sum(mass[block] for block in certain)
    for block in sorted(others, key=lambda block: (-mass[block], block)):
        margin = min(margin, abs(covered - needed))
        if covered >= needed:
            break
        chosen.add(block)
        covered += mass[block]
    left = [mass[block] for block in others if block not in chosen]
    taken = [mass[block] for block in others if block in chosen]
    return chosen, min([margin, *(min(taken) - max(left) for _ in taken[:1] if left)])


def by_blocks(n: int, block_size: int, choose: Callable[[int], Chosen]) -> Seen:
    """What queries see by the choices of their blocks."""
    seen, margins = [], []
    for block in range(-(-n // block_size)):
        chosen, margin = choose(block)
        for i in range(block * block_size, min(n, (block + 1) * block_size)):
            seen.append({j for j in range(i + 1) if j // block_size in chosen})
            margins.append(margin)
    return Seen(seen, margins)


def xattention(
    queries: Floats, keys: Floats, *, block_size: int, topk: int, threshold: float, stride: int
) -> Seen:
    """XAttention (2503.16428, algorithm 1): one product of every `stride`, along antidiagonals."""
    n, width = queries.shape
    groups = -(-n // stride)

    def score(row: int, column: int) -> float:
        total = 0.0
        for step in range(stride):
            i, j = row * stride + stride - 1 - step, column * stride + step
            if i < n and j < n:
                total += float(queries[i] @ keys[j])
        return total / np.sqrt(width) / stride

    def choose(block: int) -> Chosen:
        mass = [0.0] * (block + 1)
        of_block = block_size // stride
        for row in range(block * of_block, min(groups, (block + 1) * of_block)):
            weights = np.exp([score(row, column) for column in range(row + 1)])
            for column, weight in enumerate(weights / weights.sum()):
                mass[column // of_block] += weight
        return in_view(mass, {0, block}, topk, threshold)

    return by_blocks(n, block_size, choose)


def skip_softmax(queries: Floats, keys: Floats, *, factor: float, block_size: int) -> Seen:
    """BLASST (2512.12087): a walk over blocks of keys with a running maximum for each query."""
    n, width = queries.shape
    depth = min(0.0, float(np.log(factor / n)))

    def choose(block: int) -> Chosen:
        rows = range(block * block_size, min(n, (block + 1) * block_size))
        running = {i: -np.inf for i in rows}
        kept, margin = set(), CERTAIN
        for other in range(block + 1):
            nearest = -np.inf
            for i in rows:
                seen = range(other * block_size, min(i + 1, (other + 1) * block_size))
                largest = max(float(queries[i] @ keys[j]) / np.sqrt(width) for j in seen)
                running[i] = max(running[i], largest)
                nearest = max(nearest, largest - running[i])
            # A block that raises a maximum is in view whatever the depth.
            margin = min(margin, abs(nearest - depth) if nearest < 0 else CERTAIN)
            if nearest >= depth:
                kept.add(other)
        return kept, margin

    return by_blocks(n, block_size, choose)


def smallest_set(weights: list[float], wanted: float) -> Chosen:
    """The fewest places, the largest first, with a share of all weight; and the margin."""
    needed, covered = wanted * sum(weights), 0.0
    chosen: set[int] = set()
    order = sorted(range(len(weights)), key=lambda place: (-weights[place], place))
    margin = CERTAIN
    for rank, place in enumerate(order):
        margin = min(margin, abs(covered - needed))
        if covered >= needed:
            # A tie leaves open which of two places is chosen.
            return chosen, min(margin, weights[order[rank - 1]] - weights[place])
        chosen.add(place)
        covered += weights[place]
    return chosen, margin


def block_mean(x: Floats, block: int, block_size: int) -> Floats:
    """Mean of what there is of a block of rows."""
    return np.asarray(x[block * block_size : (block + 1) * block_size].mean(axis=0))


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


def softmax(scores: list[float]) -> list[float]:
    """Weights of scores."""
    weights = np.exp(np.array(scores) - max(scores))
    return list(weights / weights.sum())


def mean_cosine(x: Floats, block: int, block_size: int) -> float:
    """Mean cosine of all pairs of a block's rows."""
    rows = x[block * block_size : (block + 1) * block_size]
    total = 0.0
    for one in rows:
        for other in rows:
            total += float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))
    return total / len(rows) ** 2


def sparge(
    queries: Floats,
    keys: Floats,
    *,
    threshold: float,
    block_size: int,
    rows: int,
    similarity: float,
) -> Seen:
    """SpargeAttn (2502.18137, section 3.3): TopCdf over means, where blocks are self-similar."""
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


def permuted_blocks(
    queries: Floats, keys: Floats, *, block_size: int, topk: int, threshold: float, segment: int
) -> Seen:
    """PBS-Attn (2510.21270, section 3.2): keys sorted in segments by the last queries' weights."""
    n, width = queries.shape
    importance = [0.0] * n
    last = range(max(0, n - block_size), n)
    for i in last:
        for j, weight in enumerate(softmax(list(keys @ queries[i] / np.sqrt(width)))):
            importance[j] += weight / len(last)
    margin = CERTAIN
    order: list[int] = []
    for start in range(0, n, segment):
        members = list(range(start, min(n, start + segment)))
        if len(members) == segment:
            members.sort(key=lambda j: (-importance[j], j))
            for one, other in zip(members[:-1], members[1:], strict=True):
                margin = min(margin, (importance[one] - importance[other]) / importance[one])
        order += members
    cut = [order[place : place + block_size] for place in range(0, n, block_size)]

    seen: list[set[int]] = []
    margins: list[float] = []
    for i in range(n):
        start = i // segment * segment
        own = set(range(start, i + 1))
        own_margin = margin
        earlier = cut[: start // block_size]
        if earlier:
            query = block_mean(queries, i // block_size, block_size)
            means = [keys[members].mean(axis=0) for members in earlier]
            weights = softmax([float(query @ mean) / np.sqrt(width) for mean in means])
            (first,) = (place for place, members in enumerate(earlier) if 0 in members)
            chosen, by = in_view(weights, {first}, topk, threshold)
            own_margin = min(margin, by)
            for place in chosen:
                own.update(earlier[place])
        seen.append(own)
        margins.append(own_margin)
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
    for own in (pairs[: round(high * half)], pairs[half - round(low * half) :]):
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


METHODS: dict[str, Callable[..., Seen]] = {
    "power": power,
    "vertical_slash": vertical_slash,
    "xattention": xattention,
    "skip_softmax": skip_softmax,
    "flexprefill": flexprefill,
    "sparge": sparge,
    "permuted_blocks": permuted_blocks,
    "prism": prism,
    "flashprefill": flashprefill,
}


def visible(method: str, queries: Floats, keys: Floats, arguments: dict[str, Any]) -> Seen:
    """queries: [n, head_dim] of one head; keys: [n, head_dim]."""
    seen = METHODS[method](queries, keys, **arguments)
    for i, own in enumerate(seen.keys):
        assert own and max(own) <= i, "the oracle itself looks ahead"
    return seen
