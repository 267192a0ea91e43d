"""Closed forms for receptive fields: how much is covered after d layers, and when all of it is.

Exact for sliding windows. For stochastic attention the expected growth is iterated layer by layer,
each layer's permutation being independent of the set that the layers above have reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from sa_patch.patterns import SA, Pattern


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

    def mean_layers_to_all(self) -> float | None:
        """Expected layers to full coverage; None unless it is all but certain by the last."""
        if self.complete[-1] < 1 - 1e-6:
            return None
        return float((1 - self.complete).sum())


def predict(
    pattern: Pattern, seq_len: int, depth: int, *, query: int | None = None, causal: bool = True
) -> Prediction | None:
    """The receptive field of a query (the last unless given) after 0 to `depth` layers.

    Returns:
        None for a pattern without a closed form here: known are windows with sinks, full
        attention, and stochastic attention on the ring.
    """
    query = seq_len - 1 if query is None else query
    if isinstance(pattern, SA) and pattern.circular:
        if causal:
            return _causal_sa(pattern, seq_len, query, depth)
        return _two_sided_sa(pattern, seq_len, depth)
    reach = (0, seq_len) if pattern.name == "full" else pattern.bounded_reach
    return None if reach is None else _window(*reach, seq_len, query, depth, causal)


def log_coverage(seq_len: int, window: int) -> float:
    """``log n / log w``, the number of layers that the paper gives for SA (arXiv 2604.00754)."""
    return math.log(seq_len) / math.log(window) if window > 1 else math.inf


def window_coverage(seq_len: int, window: int) -> float:
    """``(n - 1) / (w - 1)``, rounded up: the layers by which a sliding window covers n tokens."""
    return math.ceil((seq_len - 1) / (window - 1)) if window > 1 else math.inf


def _window(
    sinks: int, window: int, seq_len: int, query: int, depth: int, causal: bool
) -> Prediction:
    hops = np.arange(depth + 1) * max(window - 1, 0)
    first = np.maximum(query - hops, 0)
    last = np.minimum(query + hops, seq_len - 1) if not causal else np.full(depth + 1, query)
    seen = np.where(np.arange(depth + 1) > 0, np.minimum(sinks, first), 0)
    sizes = last - first + 1 + seen
    most = query + 1 if causal else seq_len
    return Prediction(sizes / most, (sizes == most).astype(np.float64), exact=True)


def _log_miss(seq_len: int, window: int, members: np.ndarray) -> np.ndarray:
    """Log of P(none of `members` other tokens is a slot neighbour of a given token), SA.

    The token's ``2 (w - 1)`` neighbours are a uniform draw without replacement from the n - 1
    others: ``C(n - 1 - m, 2h) / C(n - 1, 2h)``, continued to any real m.
    """
    others, drawn = seq_len - 1, min(2 * (window - 1), seq_len - 1)
    left = others - np.asarray(members, dtype=np.float64)
    possible = left >= drawn
    left = np.where(possible, left, drawn)
    log = gammaln(left + 1) - gammaln(left - drawn + 1)
    log -= gammaln(others + 1) - gammaln(others - drawn + 1)
    return np.where(possible, log, -np.inf)


def _two_sided_sa(pattern: SA, seq_len: int, depth: int) -> Prediction:
    """All tokens are alike, so that the size alone is iterated."""
    size, shares, complete = 1.0, [1 / seq_len], [float(seq_len == 1)]
    for _ in range(depth):
        missed = (seq_len - size) * np.exp(_log_miss(seq_len, pattern.window, np.array(size)))
        size = seq_len - float(missed)
        shares.append(size / seq_len)
        # The uncovered ones are rare and nearly independent by the time there are none.
        complete.append(math.exp(-float(missed)))
    return Prediction(np.array(shares), np.array(complete), exact=False)


def _causal_sa(pattern: SA, seq_len: int, query: int, depth: int) -> Prediction:
    """Token j can only be reached from tokens after it: the expected share of each is iterated."""
    inside = np.zeros(query + 1)
    inside[-1] = 1.0
    shares, complete = [1 / (query + 1)], [float(query == 0)]
    for _ in range(depth):
        after = np.cumsum(inside[::-1])[::-1] - inside
        missed = (1 - inside) * np.exp(_log_miss(seq_len, pattern.window, after))
        inside = 1 - missed
        shares.append(float(inside.mean()))
        complete.append(float(np.exp(np.log1p(-np.minimum(missed, 1 - 1e-300)).sum())))
    return Prediction(np.array(shares), np.array(complete), exact=False)
