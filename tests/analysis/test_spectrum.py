"""Gaps, contractions and distances are those of dense matrices, and the ring's closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.analysis.graphs import spectrum
from sa_patch.analysis.graphs.spectrum import measure_mixing, ring_contraction
from sa_patch.errors import UserError
from sa_patch.patterns import PSA, SA, SWA, Full, Pattern, Sinks


def seen(pattern: Pattern, n: int, layer: int) -> np.ndarray:
    return np.asarray(pattern.visible(torch.arange(n), n, layer=layer)[0].numpy())


def dense_contraction(pattern: Pattern, n: int, layers: int) -> float:
    """The norm of ``D^1/2 P (I - 1 pi) D^-1/2``, P the product of walks, by SVD."""
    product = np.eye(n)
    for layer in range(layers):
        mask = seen(pattern, n, layer)
        walk = (mask | mask.T | np.eye(n, dtype=bool)).astype(float)
        degree = walk.sum(1)
        product = walk / degree[:, None] @ product
    stationary = degree / degree.sum()
    left = product - np.outer(np.ones(n), stationary)
    scaled = np.sqrt(degree)[:, None] * left / np.sqrt(degree)
    return float(np.linalg.svd(scaled, compute_uv=False)[0])


@pytest.mark.parametrize("n", [40, 90])  # dense, and by Lanczos' method
@pytest.mark.parametrize("pattern", [SA(4, 1), SWA(5), Sinks(3) | SWA(3), Full()])
def test_contraction_is_that_of_dense_matrices(pattern: Pattern, n: int) -> None:
    mixing = measure_mixing(pattern, n, 3)
    assert mixing.contraction is not None and mixing.contraction[0] == 1
    for layers in (1, 2, 3):
        expected = dense_contraction(pattern, n, layers)
        # The root of a rounding error is left where nothing is.
        assert mixing.contraction[layers] == pytest.approx(expected, abs=3e-7, rel=1e-5)
    assert mixing.gap == pytest.approx(1 - mixing.contraction[1])


def test_the_dense_and_the_sparse_way_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    one = measure_mixing(SA(5, 3), 50, 3).contraction
    monkeypatch.setattr(spectrum, "_DENSE", 10)
    other = measure_mixing(SA(5, 3), 50, 3).contraction
    assert one == pytest.approx(other, rel=1e-5)


@given(n=st.integers(8, 80), window=st.integers(2, 40))
def test_sa_gap_is_the_rings(n: int, window: int) -> None:
    if 2 * window - 1 > n:
        with pytest.raises(UserError, match="do not overlap themselves"):
            ring_contraction(SA(window), n)
        return
    gap = measure_mixing(SA(window, 1), n, 1).gap
    assert 1 - gap == pytest.approx(ring_contraction(SA(window), n), abs=3e-7, rel=1e-5)


def test_independent_layers_mix_faster_than_the_same_one_again() -> None:
    found = measure_mixing(SA(4, 7), 200, 4).contraction
    assert found is not None
    # Every layer is a ring of its own, with the same second eigenvalue.
    assert (found[1:] <= found[:-1] * found[1] * (1 + 1e-6)).all()
    assert (found[2:] < 0.9 * found[1] ** np.arange(2, 5)).all()
    assert measure_mixing(PSA(4), 60, 2).contraction is None


@pytest.mark.parametrize("pattern", [SA(3, 4), SWA(4), Sinks(2) | PSA(3), Full()])
def test_distance_is_that_of_dense_products(pattern: Pattern) -> None:
    n, layers = 30, 3
    mixing = measure_mixing(pattern, n, layers)
    row = full = np.eye(n)[-1]
    for depth, layer in enumerate(reversed(range(layers)), start=1):
        mask = seen(pattern, n, layer)
        row = row @ (mask / mask.sum(1, keepdims=True))
        full = full @ (np.tri(n) / np.arange(1, n + 1)[:, None])
        assert mixing.distance[depth] == pytest.approx(np.abs(row - full).sum() / 2, abs=1e-12)
    assert mixing.distance[0] == 0
