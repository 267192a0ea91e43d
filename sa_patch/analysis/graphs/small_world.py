"""Small worlds: path lengths and clustering of a graph, beside random graphs of equal density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from sa_patch.analysis.graphs import reachable_sets


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95% interval, 0 where nothing was sampled."""

    mean: float
    half: float


@dataclass(frozen=True)
class SmallWorld:
    """A graph's path lengths and clustering, and those of random graphs with as many edges.

    Args:
        edges: number of edges.
        path: mean number of hops between two tokens that are joined by any path.
        joined: share of pairs that are.
        clustering: mean local clustering coefficient.
        random_path, random_joined, random_clustering: the same of random graphs.
    """

    edges: int
    path: Estimate
    joined: float
    clustering: Estimate
    random_path: Estimate
    random_joined: float
    random_clustering: Estimate

    @property
    def coefficient(self) -> float | None:
        """``(C / C_random) / (L / L_random)``, above 1 for a small world (Humphries & Gurney
        2008); None where a random graph has no triangle, or any graph is not in one piece: hops
        between the pieces are infinite, and a mean over the rest says little."""
        connected = self.joined == self.random_joined == 1
        if not (connected and self.random_clustering.mean and self.path.mean):
            return None
        clustering = self.clustering.mean / self.random_clustering.mean
        return clustering / (self.path.mean / self.random_path.mean)


def measure_small_world(
    graph: sparse.csr_array, *, sample: int = 256, random_graphs: int = 3, seed: int = 0
) -> SmallWorld:
    """Measure a graph, and random ones beside it.

    Args:
        graph: bool ``[n, n]``, symmetric, with an empty diagonal; n at least 2.
        sample: tokens from which paths are followed and around which triangles are counted; all
            of them if there are no more.
        random_graphs: number of random graphs with exactly as many edges, over which is averaged.
        seed: of the sample and the random graphs.
    """
    random = np.random.default_rng(seed)
    path, joined = mean_path(graph, _tokens(graph, sample, random))
    clustering = mean_clustering(graph, _tokens(graph, sample, random))
    paths, shares, clusterings = [], [], []
    for _ in range(random_graphs):
        rival = random_graph(graph.shape[0], graph.nnz // 2, random)
        hops, share = mean_path(rival, _tokens(rival, sample, random))
        paths.append(hops)
        shares.append(share)
        clusterings.append(mean_clustering(rival, _tokens(rival, sample, random)))
    return SmallWorld(
        edges=graph.nnz // 2,
        path=path,
        joined=joined,
        clustering=clustering,
        random_path=_over_graphs(paths),
        random_joined=float(np.mean(shares)),
        random_clustering=_over_graphs(clusterings),
    )


def mean_path(graph: sparse.csr_array, tokens: np.ndarray) -> tuple[Estimate, float]:
    """Hops from some tokens to all others that can be reached.

    Args:
        graph: bool ``[n, n]``, symmetric.
        tokens: int ``[k]``, where paths start.

    Returns:
        The mean over starting tokens, and the share of pairs that are joined at all.
    """
    n, count = graph.shape[0], len(tokens)
    sets = reachable_sets.start(n, tokens)
    found = [np.ones(count, dtype=np.int64)]
    while len(found) < 2 or (found[-1] > found[-2]).any():
        sets = reachable_sets.step(sets, graph)
        found.append(reachable_sets.sizes(sets, count))
    new = np.diff(np.stack(found), axis=0)
    hops = (np.arange(1, len(found))[:, None] * new).sum(axis=0)
    reached = found[-1] - 1
    # A token that reaches nothing has no path whose length could be counted.
    means = hops[reached > 0] / reached[reached > 0]
    whole = len(means) if count == n else n
    return _estimate(means, whole), float(reached.sum() / (count * (n - 1)))


def mean_clustering(graph: sparse.csr_array, tokens: np.ndarray) -> Estimate:
    """Share of a token's pairs of neighbours that are neighbours themselves, averaged.

    Args:
        graph: bool ``[n, n]``, symmetric, with an empty diagonal.
        tokens: int ``[k]``; one with fewer than two neighbours counts as 0.
    """
    shares = [_clusterings(graph, some) for some in np.split(tokens, range(64, len(tokens), 64))]
    return _estimate(np.concatenate(shares), graph.shape[0])


def random_graph(n: int, edges: int, random: np.random.Generator) -> sparse.csr_array:
    """A uniform draw from the graphs of n tokens with that many edges: bool ``[n, n]``."""
    pairs = n * (n - 1) // 2
    # Drawn with repetition and thinned, which needs no list of all pairs; the complement where
    # more than half of them are edges.
    wanted = min(edges, pairs - edges)
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < wanted:
        more = random.integers(0, pairs, size=int(1.1 * (wanted - len(drawn))) + 16)
        drawn = np.unique(np.concatenate([drawn, more]))
    drawn = random.permutation(drawn)[:wanted]
    if wanted < edges:
        drawn = np.setdiff1d(np.arange(pairs), drawn)
    # Pair number p is (row, column) with column < row and row (row - 1) / 2 + column = p.
    row = ((1 + np.sqrt(1 + 8 * drawn.astype(np.float64))) / 2).astype(np.int64)
    row -= row * (row - 1) // 2 > drawn
    row += row * (row + 1) // 2 <= drawn
    column = drawn - row * (row - 1) // 2
    ends = (np.concatenate([row, column]), np.concatenate([column, row]))
    return sparse.csr_array((np.ones(2 * edges, dtype=bool), ends), shape=(n, n))


def _clusterings(graph: sparse.csr_array, tokens: np.ndarray) -> np.ndarray:
    neighbours = graph[tokens].astype(np.int32)
    # Entry j of row i counts the paths i - k - j: over neighbours j, each joined pair twice.
    among = (neighbours @ graph.astype(np.int32)).multiply(neighbours).sum(axis=1)
    degree = neighbours.sum(axis=1).astype(np.int64)
    return np.asarray(among / np.maximum(degree * (degree - 1), 1))


def _tokens(graph: sparse.csr_array, sample: int, random: np.random.Generator) -> np.ndarray:
    n = graph.shape[0]
    return np.arange(n) if sample >= n else random.choice(n, sample, replace=False)


def _estimate(values: np.ndarray, population: int) -> Estimate:
    """Mean over a sample without replacement, Student's t."""
    count = len(values)
    if count == 0:
        return Estimate(math.nan, 0.0)
    if count in (1, population):
        return Estimate(float(values.mean()), 0.0)
    error = values.std(ddof=1) / math.sqrt(count) * math.sqrt(1 - count / population)
    return Estimate(float(values.mean()), float(error * stats.t.isf(0.025, count - 1)))


def _over_graphs(found: list[Estimate]) -> Estimate:
    means = np.array([one.mean for one in found])
    if len(means) < 2:
        return Estimate(float(means.mean()), 0.0)
    spread = means.std(ddof=1) / math.sqrt(len(means)) * stats.t.isf(0.025, len(means) - 1)
    return Estimate(float(means.mean()), float(spread))
