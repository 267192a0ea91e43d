"""The graph of attention weights: how near tokens are to each other, and how fast it mixes.

Measures of fractional neural attention (Qu, Ly & Gong, arXiv 2511.10208). Tokens are nodes; what
two of them give each other is the mean of the weights in both directions, so that causal attention,
in which one direction is empty, has a graph of the same kind. An edge is as long as 1 / weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import shortest_path

# Weights below this are rounding: their edges would be longer than any path through others.
LEAST_WEIGHT = 1e-12


@dataclass(frozen=True)
class WeightGraph:
    """Of one head's weights for one input.

    Args:
        weights: float64 ``[n, n]``, symmetric, self-weights on the diagonal.
    """

    weights: np.ndarray

    @classmethod
    def of(cls, attention: np.ndarray) -> WeightGraph:
        """From attention weights ``[n, n]``, row i those of query i, which sum to 1."""
        values = np.asarray(attention, dtype=np.float64)
        return cls((values + values.T) / 2)

    @property
    def size(self) -> int:
        return len(self.weights)

    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, largest first, and right eigenvectors ``[n, n]`` of the graph's walk.

        The walk goes along edges in proportion to their weights; its matrix ``D^-1 W`` has the
        eigenvalues of the symmetric ``D^-1/2 W D^-1/2``, the largest of which is 1. Eigenvectors
        have norm 1 with regard to the walk's stationary distribution.
        """
        degree = self.weights.sum(axis=1)
        scale = degree**-0.5
        values, vectors = np.linalg.eigh(scale[:, None] * self.weights * scale)
        right = vectors[:, ::-1] * (scale * degree.sum() ** 0.5)[:, None]
        return values[::-1], right

    def spectral_gap(self) -> float:
        """``1 - |lambda_2|``: 0 for a graph in pieces, 1 for one that forgets in a single step."""
        values, _ = self.spectrum()
        return float(1 - np.abs(values[1:]).max())

    def diffusion_map(self, dimensions: int = 2, steps: int = 1) -> np.ndarray:
        """Coordinates ``[n, dimensions]``: the slowest eigenvectors, each times its eigenvalue to
        the power of `steps` (Coifman & Lafon 2006). Signs are such that the largest entry of each
        is positive."""
        values, vectors = self.spectrum()
        order = 1 + np.argsort(-np.abs(values[1:]), kind="stable")[:dimensions]
        found = vectors[:, order]
        signs = np.sign(found[np.abs(found).argmax(axis=0), np.arange(dimensions)])
        return np.asarray(found * signs * values[order] ** steps)

    def path_lengths(self, sources: np.ndarray | None = None) -> np.ndarray:
        """Lengths of the shortest paths ``[sources, n]``, infinite where there is none.

        Args:
            sources: indices of tokens; None for all.
        """
        shown = np.where(self.weights > LEAST_WEIGHT, self.weights, 0.0)
        np.fill_diagonal(shown, 0.0)
        edges = sparse.csr_array(shown)
        edges.data = 1.0 / edges.data
        # All of a dense graph at once is a matter of n^3 additions, source by source of more.
        method = "FW" if sources is None else "D"
        found = shortest_path(edges, method=method, directed=False, indices=sources)
        return np.asarray(found)

    def mean_path(self, sources: np.ndarray | None = None) -> float:
        """Mean length of the shortest paths between two different tokens that any path joins."""
        lengths = self.path_lengths(sources)
        rows = np.arange(self.size) if sources is None else np.asarray(sources)
        lengths[np.arange(len(rows)), rows] = np.inf
        joined = np.isfinite(lengths)
        return float(lengths[joined].mean()) if joined.any() else float("nan")
