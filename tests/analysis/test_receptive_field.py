"""Receptive fields are what products of boolean matrices say, and grow with depth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.analysis.graphs import reachable_sets
from sa_patch.analysis.graphs.content_choices import random_content
from sa_patch.analysis.receptive_field import ReceptiveField, measure_receptive_field
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, Full, Pattern, Sinks
from tests.laws.drawn import METHODS, patterns


def brute_force(pattern: Pattern, n: int, depth: int, causal: bool, seed: int) -> np.ndarray:
    """bool [depth + 1, n, n]: what each query reaches, by dense matrix products."""
    reached = [np.eye(n, dtype=bool)]
    for layer in reversed(range(depth)):
        content = random_content(n, layer, seed)
        mask = pattern.visible(torch.arange(n), n, layer=layer, q=content.q, k=content.k)[0].numpy()
        mask = mask | np.eye(n, dtype=bool)
        mask = mask if causal else mask | mask.T
        reached.append(reached[-1].astype(int) @ mask.astype(int) > 0)
    return np.stack(reached)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_sizes_are_those_of_matrix_products(method: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns(method, max_window=8))
    # Beyond 64 queries a second machine word is in use.
    n, depth = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 4))
    field = measure_receptive_field(pattern, n, depth, seed=3)
    expected = brute_force(pattern, n, depth, True, 3).sum(-1)[: field.depth + 1]
    assert np.array_equal(field.sizes, expected)
    if field.depth < depth:
        assert (field.sizes[-1] == np.arange(1, n + 1)).all()


@given(n=st.integers(2, 80), window=st.integers(1, 8), depth=st.integers(1, 4))
def test_not_causal_sizes_are_those_of_matrix_products(n: int, window: int, depth: int) -> None:
    for pattern in (SA(window, 2), SWA(window), SA(window) | SWA(2)):
        field = measure_receptive_field(pattern, n, depth, causal=False)
        expected = brute_force(pattern, n, depth, False, 0).sum(-1)[: field.depth + 1]
        assert np.array_equal(field.sizes, expected)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_receptive_fields_never_shrink(method: str, data: st.DataObject) -> None:
    pattern = data.draw(patterns(method, max_window=6))
    n = data.draw(st.integers(2, 120))
    field = measure_receptive_field(pattern, n, 6, queries=min(n, 5), seed=1)
    assert (np.diff(field.sizes, axis=0) >= 0).all()
    assert (field.sizes[0] == 1).all() and (field.shares <= 1).all()
    assert field.queries[-1] == n - 1 and len(set(field.queries)) == min(n, 5)


@given(n=st.integers(2, 200), window=st.integers(2, 30))
def test_a_sliding_window_covers_everything_in_the_exact_number_of_layers(
    n: int, window: int
) -> None:
    exact = -(-(n - 1) // (window - 1))
    field = measure_receptive_field(SWA(window), n, exact + 3, queries=2)
    assert field.layers_to(1.0) == field.layers_for_all() == exact
    assert field.layers_to(0.0) == 0


def test_steps_in_small_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_receptive_field(Sinks(2) | SA(4), 100, 3).sizes
    monkeypatch.setattr(reachable_sets, "_GATHER_WORDS", 7)
    assert np.array_equal(measure_receptive_field(Sinks(2) | SA(4), 100, 3).sizes, whole)


def test_mean_over_a_sample_has_an_interval_that_holds_the_mean_over_all() -> None:
    everyone, _ = measure_receptive_field(SA(8), 600, 3).average()
    missed = 0
    for seed in range(40):
        field = measure_receptive_field(SA(8), 600, 3, queries=60, seed=seed)
        mean, half = field.average()
        missed += abs(mean[2] - everyone[2]) > half[2]
    # 5% of 40 are 2; more than 8 have a chance below 1e-3.
    assert missed <= 8


def test_mean_layers_counts_the_layers_to_each_token() -> None:
    # From the last of 5 tokens: itself 0, two tokens in one layer, two in two.
    mean, share = measure_receptive_field(SWA(3), 5, 4).mean_layers()
    assert (mean, share) == (6 / 5, 1.0)
    mean, share = measure_receptive_field(SWA(3), 9, 1).mean_layers()
    assert (mean, share) == (2 / 3, 3 / 9)


def test_share_that_is_never_seen_is_none() -> None:
    field = measure_receptive_field(Sinks(2), 9, 3)
    assert field.layers_to(1.0) is None and field.layers_for_all() is None
    assert isinstance(field, ReceptiveField) and field.layers_to(3 / 9) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seq_len": 0}, "n must be a whole number"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"queries": 1}, "queries must be a whole number of at least 2"),
        ({"queries": 60}, "at most n = 50"),
    ],
)
def test_bad_numbers(arguments: dict[str, int], says: str) -> None:
    given_numbers: dict[str, Any] = {"seq_len": 50, "depth": 2, **arguments}
    with pytest.raises(UserError, match=says):
        measure_receptive_field(Full(), **given_numbers)
