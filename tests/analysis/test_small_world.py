"""Paths and clustering are what networkx finds, and random graphs are what they are called."""

from __future__ import annotations

import math

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from sa_patch.analysis.graphs.small_world import (
    mean_clustering,
    mean_path,
    measure_small_world,
    random_graph,
)
from sa_patch.analysis.graphs.stacked_layers import stacked_graphs
from sa_patch.analysis.graphs.visibility import undirected, visibility
from sa_patch.errors import UserError
from sa_patch.patterns import PSA, SA, SWA, Pattern, Sinks


def of_networkx(graph: sparse.csr_array) -> networkx.Graph:
    return networkx.from_scipy_sparse_array(graph.astype(int))


@given(n=st.integers(2, 90), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_paths_and_clustering_are_those_of_networkx(n: int, share: float, seed: int) -> None:
    pairs = n * (n - 1) // 2
    graph = random_graph(n, round(share**3 * pairs), np.random.default_rng(seed))
    rival = of_networkx(graph)
    hops = [
        float(np.mean(reached))
        for _, found in networkx.all_pairs_shortest_path_length(rival)
        if (reached := [hop for hop in found.values() if hop])
    ]
    path, joined = mean_path(graph, np.arange(n))
    assert (
        path.mean == pytest.approx(np.mean(hops)) if hops else math.isnan(path.mean) and not joined
    )
    assert (joined == 1) == networkx.is_connected(rival)
    clustering = mean_clustering(graph, np.arange(n))
    assert clustering.mean == pytest.approx(networkx.average_clustering(rival))
    assert path.half == clustering.half == 0


@given(n=st.integers(2, 60), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_random_graph_has_exactly_as_many_edges(n: int, share: float, seed: int) -> None:
    edges = round(share * n * (n - 1) / 2)
    graph = random_graph(n, edges, np.random.default_rng(seed)).toarray()
    assert (
        graph.sum() == 2 * edges and np.array_equal(graph, graph.T) and not graph.diagonal().any()
    )


def test_random_graph_joins_each_pair_equally_often() -> None:
    random = np.random.default_rng(3)
    counts = sum(random_graph(6, 4, random).toarray().astype(int) for _ in range(1000))
    assert isinstance(counts, np.ndarray)
    found = counts[np.triu_indices(6, 1)] / 1000
    # Five standard errors of a share of 4 / 15.
    assert (np.abs(found - 4 / 15) < 5 * math.sqrt(4 / 15 * 11 / 15 / 1000)).all()


def test_a_sample_has_an_interval_that_holds_the_whole() -> None:
    graph = undirected(visibility(PSA(6, 1), 700))
    whole = measure_small_world(graph, sample=700, random_graphs=1)
    part = measure_small_world(graph, sample=150, random_graphs=2)
    assert whole.path.half == 0 < part.path.half < 0.1 * whole.path.mean
    assert abs(whole.path.mean - part.path.mean) <= 2 * part.path.half
    assert abs(whole.clustering.mean - part.clustering.mean) <= 2 * part.clustering.half


def test_small_world_coefficient() -> None:
    """A ring lattice is clustered and far; two pieces have no coefficient."""
    world = measure_small_world(undirected(visibility(SWA(8), 400)), sample=400)
    assert world.joined == world.random_joined == 1 and world.coefficient is not None
    ratio = world.path.mean / world.random_path.mean
    assert ratio > 5 and world.clustering.mean > 0.6
    expected = world.clustering.mean / world.random_clustering.mean / ratio
    assert world.coefficient == pytest.approx(expected)
    torn = measure_small_world(undirected(visibility(Sinks(1), 30))[1:, 1:], sample=29)
    assert torn.edges == 0 and torn.joined == 0 and torn.coefficient is None


def test_random_graphs_in_several_pieces_give_no_coefficient() -> None:
    world = measure_small_world(undirected(visibility(SWA(3), 512)), sample=64)
    assert world.joined == 1 and 0.9 < world.random_joined < 1
    assert world.random_clustering.mean and world.coefficient is None


@pytest.mark.parametrize("pattern", [SA(3, 2), PSA(3), SWA(4), Sinks(2) | SA(2)])
def test_stacked_graphs_are_unions_of_layers(pattern: Pattern) -> None:
    joined = np.zeros((40, 40), dtype=bool)
    for layer, graph in enumerate(stacked_graphs(pattern, 40, 3)):
        joined |= undirected(visibility(pattern, 40, layer=layer)).toarray()
        assert np.array_equal(graph.toarray(), joined)
    assert layer == 2


def test_stack_beyond_memory_is_refused() -> None:
    with pytest.raises(UserError, match="take fewer layers or a smaller n"):
        next(stacked_graphs(SA(256), 131_072, 24))
