"""What the theory of stochastic attention says, checked by Monte Carlo with intervals.

Three statements of arXiv 2604.00754 in the terms of this package (window w, half-width h = w - 1):
how likely a pair is visible, after how many layers everything is covered, and how far attention
over the visible keys alone is from attention over all of them as w grows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.ndimage import maximum_filter1d

from sa_patch.analysis.coverage import expected_layers_to_all
from sa_patch.errors import UserError
from sa_patch.patterns import SA
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.permutation import permutation_slots

# Layers within which coverage is waited for; the token before the query, the last to be covered,
# is then missed with probability exp(-20).
_PATIENCE = 20


@dataclass(frozen=True)
class Check:
    """One number that was predicted and measured.

    Args:
        what: in words.
        n, window: of the pattern.
        predicted, measured: the number; `low` and `high` its interval at `confidence`.
        draws: independent draws behind it.
    """

    what: str
    n: int
    window: int
    predicted: float
    measured: float
    low: float
    high: float
    draws: int
    confidence: float

    @property
    def agrees(self) -> bool:
        """Whether the interval holds the prediction, up to rounding."""
        slack = 1e-9 * (1 + abs(self.predicted))
        return self.low - slack <= self.predicted <= self.high + slack


def check_numbers(n: int, windows: Sequence[int], draws: int, coverage_draws: int) -> None:
    """Refuse numbers out of range, before anything slow.

    Raises:
        UserError: unless n is at least 4, the draws at least 10, and each window from 2 to n / 2.
    """
    whole_number(n, "n", 4)
    whole_number(draws, "draws", 10)
    whole_number(coverage_draws, "coverage draws", 10)
    if not windows:
        raise UserError("give at least one window")
    for window in windows:
        whole_number(window, "window", 2)
        if SA(window).saturated(n):
            raise UserError(
                f"a window of {window} shows every pair at n = {n}, so that nothing is random; "
                f"take windows of at most {n // 2}"
            )


def pair_probability(n: int, window: int, draws: int, confidence: float = 0.95) -> Check:
    """P(a pair of tokens is visible, causality aside) = 2h / (n - 1).

    The first and the last token over drawn permutations: within one permutation the number of
    visible pairs is fixed, so that pairs drawn at random would say nothing of how it was drawn.
    Clopper-Pearson interval.
    """
    seen = 0
    for seed in range(draws):
        slots = permutation_slots(n, seed, layer=1)
        apart = abs(int(slots[0]) - int(slots[-1]))
        seen += min(apart, n - apart) < window
    low, high = stats.binomtest(seen, draws).proportion_ci(confidence)
    what = "P(pair visible) = 2h / (n - 1)"
    predicted = float(SA(window).pair_probability(n))
    return Check(what, n, window, predicted, seen / draws, low, high, draws, confidence)


def coverage_depth(
    n: int, window: int, draws: int, *, causal: bool, confidence: float = 0.95
) -> Check:
    """Mean number of layers until the last query's receptive field is everything.

    The prediction is `sa_patch.analysis.coverage.expected_layers_to_all`. The interval is Student's
    t; where every draw took equally many layers, that of a proportion of 0 in as many draws (rule
    of three) stands in for it.
    """
    limit = max(32, _PATIENCE * (n - 1) // (2 * (window - 1)))
    found = [layers_to_all(n, window, seed, limit, causal=causal) for seed in range(draws)]
    layers = np.array([limit if one is None else one for one in found], dtype=np.float64)
    spread = float(layers.std(ddof=1))
    half = spread / math.sqrt(draws) * float(stats.t.isf((1 - confidence) / 2, draws - 1))
    if spread == 0:
        half = -math.log(1 - confidence) / draws
    mean = float(layers.mean())
    predicted = expected_layers_to_all(SA(window), n, causal=causal)
    what = f"layers to full coverage, {'causal' if causal else 'not causal'}"
    said = math.nan if predicted is None else predicted
    return Check(what, n, window, said, mean, mean - half, mean + half, draws, confidence)


def layers_to_all(n: int, window: int, seed: int, depth: int, *, causal: bool) -> int | None:
    """Layers until the last query of SA sees everything; None if `depth` of them are not enough.

    The same as `sa_patch.analysis.receptive_field.measure_receptive_field`, in O(n) for a layer: in
    the order of slots, a token is reached if a reached one (with causality: a later one) lies
    within w - 1.
    """
    positions = np.arange(n)
    reached = positions == n - 1
    for layer in reversed(range(depth)):
        if reached.all():
            return depth - 1 - layer
        slots = permutation_slots(n, seed, layer).numpy()
        latest = np.empty(n, dtype=np.int64)
        latest[slots] = np.where(reached, positions, -1)
        latest_in_window = maximum_filter1d(latest, 2 * window - 1, mode="wrap")[slots]
        reached |= latest_in_window >= (positions if causal else 0)
    return depth if reached.all() else None


@dataclass(frozen=True)
class Moments:
    """Bias and variance over permutations of a mean over visible keys, in closed form."""

    bias: float
    variance: float


def estimator_moments(values: np.ndarray, query: int, window: int) -> Moments:
    """The mean over the keys that an SA query sees, as an estimate of that over all before it.

    Of the n - 1 other tokens 2h are slot neighbours, K of them before the query (hypergeometric),
    and given K these are a uniform draw without replacement from its i earlier tokens. So with
    their mean m and variance S^2 (denominator i - 1) the estimate ``(v_i + K mean) / (1 + K)``
    has, given K, the mean ``m + (v_i - m) / (1 + K)`` and the variance
    ``(K / (1 + K))^2 S^2 (1 / K - 1 / i)``.

    Args:
        values: float ``[n]``, what each key holds.
        query: i, at least 1.
        window: w.
    """
    n, own, before = len(values), values[query], values[:query]
    mean = before.mean()
    spread = before.var(ddof=1) if query > 1 else 0.0
    drawn = min(2 * (window - 1), n - 1)
    seen = np.arange(max(0, drawn - (n - 1 - query)), min(query, drawn) + 1)
    chance = stats.hypergeom(n - 1, query, drawn).pmf(seen)
    given = mean + (own - mean) / (1 + seen)
    within = spread * (seen - seen**2 / query) / (1 + seen) ** 2
    expected = float(chance @ given)
    variance = float(chance @ within + chance @ (given - expected) ** 2)
    return Moments(expected - float(values[: query + 1].mean()), variance)


def uniform_attention(
    n: int, window: int, draws: int, *, query: int | None = None, confidence: float = 0.95
) -> tuple[Check, Check]:
    """Bias and variance of SA's estimate of uniform attention, at one query (by default the last).

    The values are one fixed draw of n standard normals. Intervals: Student's t for the bias; for
    the variance a normal one with the standard error ``sqrt((m_4 - s^4) / draws)``, m_4 being the
    fourth central moment that was measured.
    """
    query = n - 1 if query is None else query
    values = np.random.default_rng(1).standard_normal(n)
    target = float(values[: query + 1].mean())
    estimates = np.empty(draws)
    for seed in range(draws):
        slots = permutation_slots(n, seed, layer=2).numpy()
        apart = np.abs(slots[: query + 1] - slots[query])
        estimates[seed] = values[: query + 1][np.minimum(apart, n - apart) < window].mean()
    moments = estimator_moments(values, query, window)
    errors = estimates - target
    bias, variance = float(errors.mean()), float(errors.var(ddof=1))
    half = math.sqrt(variance / draws) * float(stats.t.isf((1 - confidence) / 2, draws - 1))
    fourth = float(((errors - bias) ** 4).mean())
    wide = math.sqrt(max(0.0, fourth - variance**2) / draws)
    wide *= float(stats.norm.isf((1 - confidence) / 2))
    shape = n, window
    where = "last query" if query == n - 1 else f"query {query}"
    return (
        Check(
            f"bias against uniform attention, {where}",
            *shape,
            *(moments.bias, bias, bias - half, bias + half),
            *(draws, confidence),
        ),
        Check(
            f"variance around uniform attention, {where}",
            *shape,
            *(moments.variance, variance, variance - wide, variance + wide),
            *(draws, confidence),
        ),
    )


def check_propositions(
    n: int, windows: Sequence[int], draws: int, coverage_draws: int = 200
) -> list[Check]:
    """All statements at each window.

    The confidence of each interval is raised so that all together hold with 95% (Bonferroni).

    Args:
        n: number of tokens.
        windows: each from 2 to n / 2.
        draws: permutations for pairs and estimates.
        coverage_draws: stacks of layers for coverage depths, which take longer.

    Raises:
        UserError: for numbers out of range.
    """
    check_numbers(n, windows, draws, coverage_draws)
    confidence = 1 - 0.05 / (7 * len(windows))
    checks: list[Check] = []
    for window in windows:
        checks.append(pair_probability(n, window, draws, confidence))
        for causal in (False, True):
            checks.append(
                coverage_depth(n, window, coverage_draws, causal=causal, confidence=confidence)
            )
        for query in (n - 1, n // 4):
            checks += uniform_attention(n, window, draws, query=query, confidence=confidence)
    return checks
