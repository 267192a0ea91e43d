"""Predicted coverage is what is measured: exactly for windows, within intervals for SA.

Seeds are fixed, so that a test that passes once passes always.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sa_patch.analysis.coverage import (
    _next_size,
    _no_long_gap,
    expected_layers_to_all,
    log_coverage,
    predict,
)
from sa_patch.analysis.receptive_field import measure_receptive_field
from sa_patch.patterns import PSA, SA, SWA, ByHead, Full, MoBA, Pattern, Sinks


def padded(pattern: Pattern, n: int, depth: int, causal: bool) -> np.ndarray:
    """The last query's share after 0 to `depth` layers, float64 [depth + 1]."""
    last = measure_receptive_field(pattern, n, depth, causal=causal, queries=2).last
    return np.pad(last, (0, depth + 1 - len(last)), constant_values=1.0)


@given(n=st.integers(2, 90), window=st.integers(1, 12), sinks=st.integers(1, 5))
def test_windows_and_full_attention_are_predicted_exactly(n: int, window: int, sinks: int) -> None:
    depth = 6
    for pattern in (SWA(window), Sinks(sinks), Sinks(sinks) | SWA(window), Full()):
        both = isinstance(pattern, (SWA, Full))
        for causal in (True, False) if both else (True,):
            field = measure_receptive_field(pattern, n, depth, causal=causal)
            for column, query in enumerate(field.queries):
                said = predict(pattern, n, field.depth, query=int(query), causal=causal)
                assert said is not None and said.exact
                assert np.array_equal(said.shares, field.shares[:, column])
                assert np.array_equal(said.complete, said.shares == 1)


@given(n=st.integers(2, 300), window=st.integers(2, 40))
def test_layers_to_all_of_a_window_are_n_over_w(n: int, window: int) -> None:
    assert expected_layers_to_all(SWA(window), n) == math.ceil((n - 1) / (window - 1))


def test_what_is_never_covered_or_not_known() -> None:
    assert expected_layers_to_all(SWA(1), 9) is None
    assert expected_layers_to_all(SA(4), 2000, limit=50) is None
    by_head = ByHead((SWA(2), SWA(9)))
    for pattern in (PSA(4), MoBA(4), SA(4, circular=False), SA(4) | SWA(4), by_head):
        assert predict(pattern, 20, 3) is None and expected_layers_to_all(pattern, 20) is None
    assert log_coverage(1024, 32) == pytest.approx(2.0) and log_coverage(9, 1) == math.inf


@pytest.mark.parametrize(("n", "window"), [(512, 4), (300, 3), (200, 12)])
def test_two_sided_sa_covers_as_predicted(n: int, window: int) -> None:
    """Shares and mean depth over 50 draws lie within the normal interval of p = 1e-3."""
    draws, depth = 50, 8
    shares = np.stack([padded(SA(window, seed), n, depth, False) for seed in range(draws)])
    said = predict(SA(window), n, depth, causal=False)
    assert said is not None
    limit = stats.norm.isf(1e-3 / 2 / depth)
    error = shares.std(axis=0, ddof=1) / math.sqrt(draws)
    assert (np.abs(shares.mean(axis=0) - said.shares) <= limit * error + 2e-4).all()
    layers = (shares < 1).sum(axis=1)
    expected = expected_layers_to_all(SA(window), n, causal=False)
    assert expected is not None
    # Two draws are allowed for, where all of them took the same number of layers.
    error = max(layers.std(ddof=1), 0.01) / math.sqrt(draws)
    assert abs(layers.mean() - expected) <= limit * error + 0.01


@pytest.mark.parametrize(("n", "window"), [(128, 8), (160, 16)])
def test_causal_sa_needs_n_over_2h_layers_and_covers_as_predicted(n: int, window: int) -> None:
    """The token before the query can only be seen by it, with probability 2h / (n - 1) a layer."""
    draws, depth = 16, 150
    shares = np.stack([padded(SA(window, seed), n, depth, True) for seed in range(draws)])
    layers = (shares < 1).sum(axis=1)
    expected = expected_layers_to_all(SA(window), n)
    assert expected is not None and expected > (n - 1) / (2 * window - 2)
    limit = stats.norm.isf(1e-3 / 2)
    assert abs(layers.mean() - expected) <= limit * layers.std(ddof=1) / math.sqrt(draws)
    said = predict(SA(window), n, depth)
    assert said is not None
    # The mean field runs ahead by little: 0.03 at most here.
    ahead = said.shares - shares.mean(axis=0)
    error = shares.std(axis=0, ddof=1) / math.sqrt(draws)
    assert (ahead <= 0.03 + limit * error).all() and (ahead >= -limit * error - 2e-3).all()


@pytest.mark.parametrize(("n", "window", "size"), [(9, 2, 3), (10, 3, 2), (8, 2, 4), (14, 2, 6)])
def test_growth_of_a_size_is_that_over_all_draws(n: int, window: int, size: int) -> None:
    covered = []
    for slots in combinations(range(n), size):
        near = {(slot + step) % n for slot in slots for step in range(1 - window, window)}
        covered.append(len(near))
    mean, variance = _next_size(window, n, size)
    assert mean == pytest.approx(np.mean(covered)) and variance == pytest.approx(np.var(covered))
    everything = np.mean(np.array(covered) == n)
    assert 0 < everything < 1 or n == 10
    assert _no_long_gap(window, n, size) == pytest.approx(everything)


def test_prediction_at_another_query_and_its_first_layers() -> None:
    said = predict(SA(5), 40, 2, query=9)
    assert said is not None and not said.exact
    # One layer is exact: itself, and each earlier token with probability 8 / 39.
    assert said.shares[:2] == pytest.approx([0.1, (1 + 9 * 8 / 39) / 10])
    assert said.layers_to(0.1) == 0 and said.layers_to(1.0) is None
