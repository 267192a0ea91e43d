"""Measures of attention's weight graph, against closed forms and networkx."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.analysis.graphs.weight_graph import WeightGraph


def random_attention(n: int, seed: int, causal: bool = False) -> np.ndarray:
    weights = np.random.default_rng(seed).random((n, n)) ** 3 + 1e-3
    if causal:
        weights = np.tril(weights)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def ring(n: int) -> np.ndarray:
    """Half of the weight on oneself, the other half on the two neighbours."""
    weights = np.eye(n) / 2
    for step in (1, -1):
        weights += np.roll(np.eye(n), step, axis=1) / 4
    return weights


def test_uniform_attention_forgets_in_one_step() -> None:
    graph = WeightGraph.of(np.full((7, 7), 1 / 7))
    assert graph.spectral_gap() == pytest.approx(1)
    assert graph.mean_path() == pytest.approx(7)


def test_a_rings_gap_and_paths_have_closed_forms() -> None:
    n = 12
    graph = WeightGraph.of(ring(n))
    assert graph.spectral_gap() == pytest.approx(1 - (1 + np.cos(2 * np.pi / n)) / 2)
    hops = np.minimum(np.arange(n), n - np.arange(n))
    assert graph.path_lengths(np.array([0]))[0] == pytest.approx(4.0 * hops)
    assert graph.mean_path() == pytest.approx(4.0 * hops[1:].mean())


def test_a_rings_diffusion_map_is_a_circle() -> None:
    places = WeightGraph.of(ring(16)).diffusion_map()
    radius = np.hypot(*places.T)
    assert radius == pytest.approx(np.full(16, radius[0]))
    angles = np.unwrap(np.arctan2(places[:, 1], places[:, 0]))
    assert np.abs(np.diff(angles)) == pytest.approx(np.full(15, 2 * np.pi / 16))


def test_two_pieces_have_no_gap_and_paths_within_them_only() -> None:
    weights = np.zeros((6, 6))
    weights[:3, :3] = weights[3:, 3:] = 1 / 3
    graph = WeightGraph.of(weights)
    assert graph.spectral_gap() == pytest.approx(0, abs=1e-12)
    assert np.isinf(graph.path_lengths()[0, 3:]).all()
    assert graph.mean_path() == pytest.approx(3)


@pytest.mark.parametrize("causal", [False, True])
@given(n=st.integers(3, 12), seed=st.integers(0, 2**20))
def test_paths_are_those_of_networkx(causal: bool, n: int, seed: int) -> None:
    attention = random_attention(n, seed, causal)
    graph = nx.Graph()
    for i in range(n):
        for j in range(i):
            graph.add_edge(i, j, length=2 / (attention[i, j] + attention[j, i]))
    expected = dict(nx.all_pairs_dijkstra_path_length(graph, weight="length"))
    found = WeightGraph.of(attention).path_lengths()
    for i in range(n):
        assert found[i] == pytest.approx([expected[i][j] for j in range(n)])


@given(n=st.integers(3, 12), seed=st.integers(0, 2**20))
def test_eigenvectors_are_those_of_the_walk(n: int, seed: int) -> None:
    graph = WeightGraph.of(random_attention(n, seed))
    values, vectors = graph.spectrum()
    degree = graph.weights.sum(axis=1)
    walk = graph.weights / degree[:, None]
    assert walk @ vectors == pytest.approx(vectors * values)
    assert values[0] == pytest.approx(1) and np.ptp(vectors[:, 0]) == pytest.approx(0, abs=1e-9)
    stationary = degree / degree.sum()
    assert (vectors**2 * stationary[:, None]).sum(axis=0) == pytest.approx(np.ones(n))
    expected = np.sort(np.abs(np.linalg.eigvals(walk)))[-2]
    assert graph.spectral_gap() == pytest.approx(1 - expected)


@given(n=st.integers(4, 10), seed=st.integers(0, 2**20))
def test_distances_in_all_dimensions_are_those_of_the_walk(n: int, seed: int) -> None:
    """Coifman & Lafon 2006, section 2: Euclidean distance in the map is the distance of where the
    walks lead, weighted by the stationary distribution."""
    graph = WeightGraph.of(random_attention(n, seed))
    places = graph.diffusion_map(dimensions=n - 1, steps=2)
    degree = graph.weights.sum(axis=1)
    two = np.linalg.matrix_power(graph.weights / degree[:, None], 2)
    stationary = degree / degree.sum()
    expected = np.sqrt((((two[0] - two[1]) ** 2) / stationary).sum())
    assert np.linalg.norm(places[0] - places[1]) == pytest.approx(expected)
