"""What the oracles of several methods share: choices with their margins, weights and means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def softmax(scores: list[float]) -> list[float]:
    """Weights of scores."""
    weights = np.exp(np.array(scores) - max(scores))
    return list(weights / weights.sum())


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


def by_blocks(n: int, block_size: int, choose: Callable[[int], Chosen]) -> Seen:
    """What queries see by the choices of their blocks."""
    seen, margins = [], []
    for block in range(-(-n // block_size)):
        chosen, margin = choose(block)
        for i in range(block * block_size, min(n, (block + 1) * block_size)):
            seen.append({j for j in range(i + 1) if j // block_size in chosen})
            margins.append(margin)
    return Seen(seen, margins)


def block_mean(x: Floats, block: int, block_size: int) -> Floats:
    """Mean of what there is of a block of rows."""
    return np.asarray(x[block * block_size : (block + 1) * block_size].mean(axis=0))


def mean_cosine(x: Floats, block: int, block_size: int) -> float:
    """Mean cosine of all pairs of a block's rows."""
    rows = x[block * block_size : (block + 1) * block_size]
    total = 0.0
    for one in rows:
        for other in rows:
            total += float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))
    return total / len(rows) ** 2
