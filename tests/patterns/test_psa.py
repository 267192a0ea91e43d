"""Prefix-stable stochastic attention: its points, its budget, and that nothing ever changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sa_patch import PSA, SA
from sa_patch.errors import UserError
from sa_patch.patterns.prefix_stable import RING_SIZE
from tests.laws.drawn import patterns

P_VALUE = 1e-4


def points(n: int, seed: int = 0, layer: int = 0, head: int | None = None) -> np.ndarray:
    pattern = PSA(8, seed, per_head=head is not None)
    drawn = pattern.ring(n, layer, 1 if head is None else head + 1).points
    return np.asarray(drawn[-1].numpy())


@given(data=st.data(), n=st.integers(1, 60), more=st.integers(0, 60), layer=st.integers(0, 9))
def test_what_follows_changes_no_visible_set(
    data: st.DataObject, n: int, more: int, layer: int
) -> None:
    pattern = data.draw(patterns("psa"))
    positions = torch.arange(n)
    alone = pattern.visible(positions, n, layer=layer, heads=3)
    longer = pattern.visible(positions, n + more, layer=layer, heads=3)
    assert torch.equal(longer[..., :n], alone)
    assert not longer[..., n:].any()


@pytest.mark.parametrize("n, window", [(40, 1), (40, 5), (90, 16), (30, 40)])
def test_every_query_sees_window_keys_in_expectation(n: int, window: int) -> None:
    draws = 1000
    expected = PSA(window).keys_per_query(n).numpy()
    assert np.allclose(expected, np.minimum(np.arange(1, n + 1), window), atol=n / RING_SIZE)
    counts = np.stack(
        [PSA(window, seed).count_visible(n, layer=seed % 5)[0] for seed in range(draws)]
    )
    error = counts.std(axis=0) / math.sqrt(draws)
    limit = stats.norm.isf(P_VALUE / n)
    assert (np.abs(counts.mean(axis=0) - expected) <= limit * error + 1e-4).all()
    assert (counts[:, : min(window, n)] == np.arange(1, min(window, n) + 1)).all()


@pytest.mark.parametrize("n, window", [(24, 4), (50, 20)])
def test_every_earlier_key_is_visible_with_the_same_probability(n: int, window: int) -> None:
    draws = 3000
    seen = np.zeros((n, n))
    for seed in range(draws):
        seen += PSA(window, seed).visible(torch.arange(n), n, layer=2)[0].numpy()
    row, column = np.tril_indices(n, -1)
    probability = np.minimum(1, (window - 1) / np.maximum(1, row))
    spread = np.sqrt(probability * (1 - probability) / draws)
    limit = stats.norm.isf(P_VALUE / len(row))
    assert (np.abs(seen[row, column] / draws - probability) <= limit * spread + 1e-5).all()
    assert (np.diag(seen) == draws).all()


@pytest.mark.parametrize("along", ["positions", "seeds", "layers", "heads"])
def test_points_are_uniform_on_the_ring(along: str) -> None:
    drawn = {
        "positions": lambda: points(4000),
        "seeds": lambda: np.array([points(8, seed=seed)[7] for seed in range(4000)]),
        "layers": lambda: np.array([points(8, layer=layer)[7] for layer in range(4000)]),
        "heads": lambda: PSA(8, per_head=True).ring(8, 0, 300).points[:, 7].numpy(),
    }[along]()
    assert drawn.min() >= 0 and drawn.max() < RING_SIZE
    assert stats.kstest(drawn / RING_SIZE, "uniform").pvalue > P_VALUE
    steps = (drawn[1:] - drawn[:-1]) % RING_SIZE
    assert stats.kstest(steps / RING_SIZE, "uniform").pvalue > P_VALUE


def test_points_of_a_head_do_not_depend_on_how_many_there_are() -> None:
    together = PSA(8, 3, per_head=True).ring(16, 2, 5).points
    for head in range(5):
        assert np.array_equal(points(16, 3, 2, head), together[head].numpy())


def test_no_two_coordinates_share_their_points() -> None:
    drawn = {
        points(16, seed, layer, head).tobytes()
        for seed in range(-3, 8)
        for layer in range(8)
        for head in (None, 0, 1, 2)
    }
    assert len(drawn) == 11 * 8 * 4


def test_reach_is_a_whole_number_rounded_down() -> None:
    reach = PSA(10).reach(5000)
    assert reach[4999] == 9 * 2**23 // 4999
    assert reach[9] == 2**23 and reach[10] < 2**23


@given(data=st.data(), n=st.integers(1, 70), method=st.sampled_from(["sa", "psa"]))
def test_candidates_hold_what_is_near_and_nothing_twice(
    data: st.DataObject, n: int, method: str
) -> None:
    pattern = data.draw(patterns(method))
    assert isinstance(pattern, (SA, PSA))
    ring = pattern.ring(n, layer=3, heads=2)
    end = data.draw(st.integers(1, n))
    queries = torch.arange(end)
    keys, meant = ring.candidates(queries, end)
    seen = torch.zeros(len(ring.points), end, end, dtype=torch.int64)
    seen.scatter_add_(2, keys.where(meant, 0), meant.long())
    near = ring.rule()(queries[None, :, None], queries[None, None])
    assert torch.equal(seen, near.long().expand_as(seen))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"window": 0}, "at least 1"),
        ({"window": 4, "seed": 1.5}, "seed must be a whole number"),
        ({"window": 4, "per_head": 1}, "per_head must be true or false"),
    ],
)
def test_bad_parameters_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        PSA(**arguments)
