"""Predictions are exact where all draws can be counted, and a wrong one is seen."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.analysis import propositions
from sa_patch.analysis.propositions import (
    check_numbers,
    check_propositions,
    estimator_moments,
    layers_to_all,
    pair_probability,
)
from sa_patch.analysis.receptive_field import measure_receptive_field
from sa_patch.errors import UserError
from sa_patch.patterns import SA


@given(
    n=st.integers(4, 90), window=st.integers(2, 20), seed=st.integers(0, 99), causal=st.booleans()
)
def test_layers_to_all_are_those_of_the_receptive_field(
    n: int, window: int, seed: int, causal: bool
) -> None:
    window = min(window, n // 2)
    for depth in (3, 60):
        field = measure_receptive_field(SA(window, seed), n, depth, causal=causal, queries=2)
        assert layers_to_all(n, window, seed, depth, causal=causal) == field.layers_to(1.0)


@pytest.mark.parametrize(("query", "window"), [(6, 2), (6, 3), (3, 2), (1, 3)])
def test_moments_are_those_over_all_permutations(query: int, window: int) -> None:
    n = 7
    values = np.random.default_rng(5).standard_normal(n)
    found = []
    for slots in permutations(range(n)):
        apart = np.abs(np.array(slots[: query + 1]) - slots[query])
        found.append(values[: query + 1][np.minimum(apart, n - apart) < window].mean())
    moments = estimator_moments(values, query, window)
    assert moments.bias == pytest.approx(np.mean(found) - values[: query + 1].mean())
    assert moments.variance == pytest.approx(np.var(found))


def test_all_statements_agree_and_intervals_are_narrow() -> None:
    checks = check_propositions(96, [5, 16], 300, 30)
    assert len(checks) == 14 and all(check.agrees for check in checks)
    for check in checks:
        assert check.low <= check.measured <= check.high
        if check.what.startswith(("P(", "layers")):
            assert check.high - check.low < 0.5 * check.measured + 0.2


def test_a_wrong_prediction_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pair_probability(64, 8, 1500, 0.999)
    assert right.agrees
    # A window of w slots to either side, instead of w - 1, and one of w in all.
    for wrong in (18 / 63, 7 / 63):
        assert not dataclasses.replace(right, predicted=wrong).agrees
    with monkeypatch.context() as patch:
        patch.setattr(propositions, "expected_layers_to_all", lambda *_, **__: 2.0)
        off = propositions.coverage_depth(64, 8, 30, causal=True)
    assert not off.agrees and off.measured > 3


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((3, [2], 50, 50), "n must be a whole number of at least 4"),
        ((64, [2], 9, 50), "draws must be a whole number of at least 10"),
        ((64, [2], 50, 9), "coverage draws must be"),
        ((64, [], 50, 50), "give at least one window"),
        ((64, [1], 50, 50), "window must be a whole number of at least 2"),
        ((64, [33], 50, 50), "take windows of at most 32"),
    ],
)
def test_bad_numbers(numbers: tuple[int, list[int], int, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_numbers(*numbers)
