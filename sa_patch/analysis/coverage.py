"""Closed forms for receptive fields: how much is covered after d layers, and when all of it is.

Exact for sliding windows. For stochastic attention the growth is iterated layer by layer, each
layer's permutation being independent of the set that the layers above have reached: without
causality the size's mean and variance; with it which of the last tokens are reached, and the
expected share of each earlier one. That takes for certain what is only expected (mean field), and
runs ahead of the truth a little in the first layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from scipy.special import gammaln

from sa_patch.patterns import SA, ByHead, Full, Pattern

# What is still missed of a token that counts as reached: a billionth of a token in a billion.
_REACHED = 1e-18
# Tokens before the query, itself among them, that are followed as a Markov chain of subsets.
_LATE = 12
# Nodes and weights by which a normal distribution's mean is taken over a function.
_NODES = ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6))


@dataclass(frozen=True)
class Prediction:
    """What one query's receptive field is expected to be.

    Args:
        shares: float64 ``[depth + 1]``, expected share of what full attention sees.
        complete: float64 ``[depth + 1]``, probability that all of it is covered.
        exact: whether that is certain (no randomness, no approximation).
    """

    shares: np.ndarray
    complete: np.ndarray
    exact: bool

    def layers_to(self, share: float) -> int | None:
        """The first depth whose expected share is at least `share`; None within this depth."""
        done = np.flatnonzero(self.shares >= share)
        return int(done[0]) if len(done) else None


def predict(
    pattern: Pattern, seq_len: int, depth: int, *, query: int | None = None, causal: bool = True
) -> Prediction | None:
    """The receptive field of a query (the last unless given) after 0 to `depth` layers.

    Returns:
        None for a pattern without a closed form here: known are windows with sinks, full
        attention, and stochastic attention on the ring, the same for all heads.
    """
    query = seq_len - 1 if query is None else query
    layers = _layers(pattern, seq_len, query, causal)
    if layers is None:
        return None
    shares, complete = zip(*islice(layers, depth + 1), strict=True)
    return Prediction(np.array(shares), np.array(complete), exact=not isinstance(pattern, SA))


def expected_layers_to_all(
    pattern: Pattern, seq_len: int, *, causal: bool = True, limit: int = 100_000
) -> float | None:
    """Expected number of layers until the last query sees everything.

    Returns:
        None for a pattern without a closed form, or where `limit` layers are not enough.
    """
    layers = _layers(pattern, seq_len, seq_len - 1, causal)
    if layers is None:
        return None
    expected = 0.0
    for _, complete in islice(layers, limit):
        if complete >= 1 - 1e-9:
            return expected
        expected += 1 - complete
    return None


def log_coverage(seq_len: int, window: int) -> float:
    """``log n / log w``, the number of layers that the paper gives for SA (arXiv 2604.00754)."""
    return math.log(seq_len) / math.log(window) if window > 1 else math.inf


def _layers(
    pattern: Pattern, seq_len: int, query: int, causal: bool
) -> Iterator[tuple[float, float]] | None:
    """Expected share and probability of full coverage after 0, 1, 2... layers, without end."""
    if isinstance(pattern, SA):
        if not pattern.circular:
            return None
        if causal:
            return _causal_sa(pattern.window, seq_len, query)
        return _two_sided_sa(pattern.window, seq_len)
    if isinstance(pattern, ByHead):
        # Its bounded reach is that of no head, but of the widest in each direction.
        return None
    reach = (0, seq_len) if isinstance(pattern, Full) else pattern.bounded_reach
    return None if reach is None else _window(*reach, seq_len, query, causal)


def _window(
    sinks: int, window: int, seq_len: int, query: int, causal: bool
) -> Iterator[tuple[float, float]]:
    most = query + 1 if causal else seq_len
    depth = 0
    while True:
        first = max(query - depth * max(window - 1, 0), 0)
        last = query if causal else min(query + depth * max(window - 1, 0), seq_len - 1)
        size = last - first + 1 + (min(sinks, first) if depth else 0)
        yield size / most, float(size == most)
        depth += 1


def _log_choose(n: np.ndarray, k: np.ndarray | float) -> np.ndarray:
    """Log of ``C(n, k)``, -inf where k > n, continued to real n and k."""
    n, k = np.broadcast_arrays(np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64))
    possible = k <= n
    k = np.where(possible, k, 0.0)
    n = np.where(possible, n, 0.0)
    return np.where(possible, gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1), -np.inf)


def _two_sided_sa(window: int, seq_len: int) -> Iterator[tuple[float, float]]:
    """All tokens are alike: mean and variance of the size, and the gaps between its members.

    In the next layer the members lie in uniformly drawn slots. Nothing stays uncovered if no gap
    between neighbouring members is longer than 2h, h = w - 1.
    """
    mean, variance = 1.0, 0.0
    yield mean / seq_len, float(seq_len == 1)
    while True:
        sizes = [min(max(mean + math.sqrt(variance) * x, 1.0), seq_len) for x, _ in _NODES]
        weights = np.array([weight for _, weight in _NODES])
        found = np.array([_next_size(window, seq_len, size) for size in sizes])
        mean = float(weights @ found[:, 0])
        variance = float(weights @ (found[:, 1] + (found[:, 0] - mean) ** 2))
        complete = np.array([_no_long_gap(window, seq_len, size) for size in sizes])
        yield mean / seq_len, float(weights @ complete)


def _next_size(window: int, seq_len: int, size: float) -> tuple[float, float]:
    """Mean and variance of the slots within w - 1 of `size` uniformly drawn slots of a ring."""
    wide = min(2 * window - 1, seq_len)
    none = _log_choose(np.array(seq_len), size)
    alone = float(np.exp(_log_choose(np.array(seq_len - wide), size) - none))
    missed = seq_len * alone
    # Two slots stay uncovered together if no member lies in the union of their windows.
    distance = np.arange(1, seq_len)
    distance = np.minimum(distance, seq_len - distance)
    union = np.minimum(wide + np.minimum(distance, wide), seq_len)
    pairs = seq_len * float(np.exp(_log_choose(seq_len - union, size) - none).sum())
    return seq_len - missed, max(0.0, pairs + missed - missed**2)


def _no_long_gap(window: int, seq_len: int, size: float) -> float:
    """P(no gap of more than 2 (w - 1) free slots between `size` uniformly drawn slots of a ring).

    The gaps are a uniform composition of the free slots, so that k given ones are all that long
    with probability ``C(n - 1 - k (2w - 1), s - 1) / C(n - 1, s - 1)``; inclusion and exclusion.
    """
    wide = 2 * window - 1
    # The windows of fewer members cannot meet.
    if size * wide < seq_len:
        return 0.0
    k = np.arange(min(int(size), (seq_len - 1) // wide) + 1)
    log = _log_choose(np.array(size), k) + _log_choose(seq_len - 1 - k * wide, size - 1)
    log -= _log_choose(np.array(seq_len - 1), size - 1)
    # So many long gaps are expected that none is out of the question, and the sum is all rounding.
    if len(k) > 1 and log[1] > math.log(25):
        return 0.0
    return float(np.clip(((-1.0) ** k * np.exp(log)).sum(), 0, 1))


def _causal_sa(window: int, seq_len: int, query: int) -> Iterator[tuple[float, float]]:
    """Tokens can only be reached from later ones, so that those just before the query come last.

    A token's 2 (w - 1) slot neighbours are a uniform draw from the n - 1 others, so that it stays
    unreached from m tokens with probability ``C(n - 1 - m, 2h) / C(n - 1, 2h)``. Which of the last
    few tokens are reached is followed as a Markov chain over all their subsets; of each earlier
    one the expected share is iterated, as though they were independent.
    """
    drawn = min(2 * (window - 1), seq_len - 1)
    all_others = _log_choose(np.array(seq_len - 1), drawn)

    def unreached(members: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(_log_choose(seq_len - 1 - members, drawn) - all_others))

    late = min(_LATE, query + 1)
    subsets = np.arange(1 << late)
    counts = np.bitwise_count(subsets).astype(np.int64)
    # Bit b is the token b before the query; the query itself is there from the start.
    chance = (subsets == 1).astype(np.float64)
    stays = unreached(np.arange(late + 1))
    missed = np.ones(query + 1 - late)
    yield 1 / (query + 1), float(query == 0)
    while True:
        of_count = np.bincount(counts, weights=chance, minlength=late + 1)
        after = np.cumsum(1 - missed[::-1])[::-1] - (1 - missed)
        missed = missed * sum(
            share * unreached(after + count) for count, share in enumerate(of_count) if share
        )
        # Early tokens are reached first. What follows depends on later ones alone, so that they
        # can be left out, and many layers cost little.
        missed = missed[int(np.argmax(missed > _REACHED)) if (missed > _REACHED).any() else -1 :]
        for bit in reversed(range(1, late)):
            # The farthest first: each is reached from the tokens that the layer above had reached.
            without = np.flatnonzero(~subsets >> bit & 1)
            stay = stays[counts[without & ((1 << bit) - 1)]]
            chance[without | (1 << bit)] += chance[without] * (1 - stay)
            chance[without] *= stay
        left = float(missed.sum()) + float(chance @ (late - counts))
        early = float(np.exp(np.log1p(-np.minimum(missed, 1 - 1e-16)).sum()))
        yield 1 - left / (query + 1), early * float(chance[-1])
