"""How fast uniform attention over visible keys mixes: spectral gaps, and products of layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, eigsh

from sa_patch.analysis.graphs.stacked_layers import differs_by_layer, layer_matrix
from sa_patch.analysis.graphs.visibility import undirected
from sa_patch.errors import UserError
from sa_patch.patterns import SA, Pattern
from sa_patch.patterns.base import whole_number

# Two eigenvalues are looked for among more than these by Lanczos' method, else densely.
_DENSE = 64
# The root of an eigenvalue that may be off by the rounding of doubles near 1.
_ROUNDING = 1e-7


@dataclass(frozen=True)
class Mixing:
    """What is left of the difference between inputs after a stack of layers.

    Args:
        gap: one layer's spectral gap, 1 - |lambda_2|, of the walk on its undirected graph.
        contraction: float64 ``[layers + 1]``: the largest factor by which layers 0 to d - 1
            together can still stretch a vector without its constant part, in the norm of the
            walks' stationary distribution; 1 for none, 0 for less than can be told from rounding.
            ``contraction[1]`` is |lambda_2|. None where degrees differ between layers, as there
            is then no such norm.
        distance: float64 ``[layers + 1]``: total variation distance between what the last query
            takes in through d causal layers and what it takes in through d layers of full
            attention, both uniform over visible keys.
    """

    gap: float
    contraction: np.ndarray | None
    distance: np.ndarray


def measure_mixing(pattern: Pattern, seq_len: int, layers: int, *, seed: int = 0) -> Mixing:
    """Spectra of a pattern's layers and of their product.

    Args:
        pattern: of every layer, drawn anew in each where it is random.
        seq_len: number of tokens, at least 3.
        layers: number of layers.
        seed: of random queries and keys, for patterns that choose by content.

    Raises:
        UserError: for numbers out of range.
    """
    whole_number(seq_len, "n", 3)
    whole_number(layers, "layers", 1)
    needed = layers if differs_by_layer(pattern) else 1
    walks = [_walk(pattern, seq_len, layer, seed) for layer in range(needed)]
    second = _largest(walks[:1], seq_len)
    contraction = None
    if needed == 1:
        # Powers of one symmetric matrix.
        contraction = second ** np.arange(layers + 1)
    elif all(np.array_equal(walk.degree, walks[0].degree) for walk in walks):
        found = [_largest(walks[:depth], seq_len) for depth in range(2, layers + 1)]
        contraction = np.array([1.0, second, *found][: layers + 1])
    return Mixing(1 - second, contraction, _distance(pattern, seq_len, layers, seed))


def ring_contraction(pattern: SA, seq_len: int) -> float:
    """|lambda_2| of one layer of two-sided SA: the eigenvalues of a ring are a Dirichlet kernel.

    ``sin(pi m (2w - 1) / n) / ((2w - 1) sin(pi m / n))`` for m = 1 to n - 1.

    Raises:
        UserError: unless the pattern is circular and its window does not go all around.
    """
    wide = 2 * pattern.window - 1
    if not pattern.circular or wide > seq_len:
        raise UserError("the closed form is that of a ring whose windows do not overlap themselves")
    angle = np.pi * np.arange(1, seq_len) / seq_len
    return float(np.abs(np.sin(wide * angle) / (wide * np.sin(angle))).max())


@dataclass(frozen=True)
class _Walk:
    """Uniform steps to a neighbour or to oneself, scaled to a symmetric matrix."""

    symmetric: sparse.csr_array
    degree: np.ndarray


def _walk(pattern: Pattern, seq_len: int, layer: int, seed: int) -> _Walk:
    graph = undirected(layer_matrix(pattern, seq_len, layer, seed=seed)).astype(np.float64)
    graph = graph + sparse.eye_array(seq_len, format="csr")
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = sparse.diags_array(degree**-0.5)
    return _Walk((scale @ graph @ scale).tocsr(), degree)


def _largest(walks: list[_Walk], seq_len: int) -> float:
    """Largest singular value of a product of walks, that of the constant left out."""
    constant = np.sqrt(walks[0].degree)
    constant /= np.linalg.norm(constant)

    def apply(x: np.ndarray) -> np.ndarray:
        x = x.ravel() - constant * (constant @ x.ravel())
        for walk in walks:
            x = walk.symmetric @ x
        for walk in reversed(walks):
            x = walk.symmetric @ x
        return np.asarray(x - constant * (constant @ x))

    if seq_len <= _DENSE:
        product = np.stack([apply(row) for row in np.eye(seq_len)])
        largest = float(np.linalg.eigvalsh((product + product.T) / 2)[-1])
    else:
        operator = LinearOperator((seq_len, seq_len), matvec=apply, dtype=np.float64)
        begin = np.random.default_rng(0).standard_normal(seq_len)
        largest = float(eigsh(operator, k=1, v0=begin, tol=1e-7, return_eigenvectors=False)[0])
    root = max(0.0, largest) ** 0.5
    return root if root > _ROUNDING else 0.0


def _distance(pattern: Pattern, seq_len: int, layers: int, seed: int) -> np.ndarray:
    """Total variation distance from full attention, layer by layer down from the last query."""
    sparse_part = np.zeros(seq_len)
    sparse_part[-1] = 1.0
    full_part = sparse_part.copy()
    found = [0.0]
    before = np.arange(1, seq_len + 1)
    matrix = None
    for layer in reversed(range(layers)):
        if matrix is None or differs_by_layer(pattern):
            matrix = layer_matrix(pattern, seq_len, layer, seed=seed)
        # No row is empty: every pattern shows a query its own key or the first one.
        spread = sparse_part / np.diff(matrix.indptr)
        sparse_part = matrix.T.astype(np.float64) @ spread
        full_part = np.cumsum((full_part / before)[::-1])[::-1]
        found.append(float(np.abs(sparse_part - full_part).sum() / 2))
    return np.array(found)
