"""Methods that choose blocks by scores of tokens, from their papers."""

from __future__ import annotations

import numpy as np

from tests.rival_oracle.shared import (
    CERTAIN,
    Chosen,
    Floats,
    Seen,
    block_mean,
    by_blocks,
    in_view,
    softmax,
)


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


def permuted_blocks(
    queries: Floats, keys: Floats, *, block_size: int, topk: int, threshold: float, segment: int
) -> Seen:
    """PBS-Attn (2510.21270): keys sorted in segments by the last queries' weights."""
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
