"""The sparse matrix of a layer is the pattern's definition, whatever the pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.analysis.graphs.content_choices import random_content
from sa_patch.analysis.graphs.visibility import (
    check_visibility,
    expected_pairs,
    undirected,
    visibility,
)
from sa_patch.errors import UserError
from sa_patch.patterns import PSA, SA, SWA, Full, MoBA, Pattern, Sinks, Tail
from sa_patch.patterns import visible_pairs as pairs
from tests.laws.drawn import METHODS, grid_patterns, patterns


def defined(pattern: Pattern, n: int, layer: int, seed: int) -> np.ndarray:
    content = random_content(n, layer, seed)
    seen = pattern.visible(torch.arange(n), n, layer=layer, q=content.q, k=content.k)
    return np.asarray(seen[0].numpy())


@pytest.mark.parametrize("chunk", [pairs.CHUNK_PAIRS, 60])
@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_matrix_is_the_definition(method: str, chunk: int, data: st.DataObject) -> None:
    pattern = data.draw(patterns(method))
    n, layer = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 40))
    content = random_content(n, layer, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "CHUNK_PAIRS", chunk)
        matrix = visibility(pattern, n, layer=layer, content=content)
    assert matrix.dtype == bool and matrix.shape == (n, n)
    # No pair may be stored twice: degrees and products are counted from what is stored.
    assert matrix.nnz == len(set(zip(*matrix.nonzero(), strict=True)))
    assert np.array_equal(matrix.toarray(), defined(pattern, n, layer, 5))


@pytest.mark.parametrize("method", METHODS)
def test_edge_cases_are_the_definition(method: str) -> None:
    for n in (1, 2, 31):
        for pattern in grid_patterns(method, n):
            matrix = visibility(pattern, n, layer=2, content=random_content(n, 2, 1))
            assert np.array_equal(matrix.toarray(), defined(pattern, n, 2, 1)), (pattern, n)


@given(n=st.integers(1, 40), window=st.integers(1, 30), circular=st.booleans())
def test_not_causal_is_the_mirrored_causal_set(n: int, window: int, circular: bool) -> None:
    for pattern in (SA(window, 3, circular), SWA(window), Full(), SA(window) | SWA(2)):
        causal = visibility(pattern, n, layer=1).toarray()
        both = visibility(pattern, n, layer=1, causal=False).toarray()
        assert np.array_equal(both, causal | causal.T)
        assert np.array_equal(np.tril(both), causal)


@pytest.mark.parametrize("pattern", [PSA(4), Sinks(2), Tail(3), MoBA(4), SWA(3) | Sinks(2)])
def test_patterns_without_a_non_causal_form_are_refused(pattern: Pattern) -> None:
    with pytest.raises(UserError, match="has no non-causal form"):
        visibility(pattern, 20, causal=False)


@pytest.mark.parametrize(
    ("pattern", "n", "says"),
    [(Full(), 131_072, "smaller n or window"), (SWA(4), 0, "n must be a whole number")],
)
def test_what_cannot_be_built_is_refused(pattern: Pattern, n: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_visibility(pattern, n)


def test_content_is_asked_for() -> None:
    with pytest.raises(UserError, match="chooses keys by content"):
        visibility(Sinks(2) | MoBA(4), 20)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [SWA(5), SA(40), Full()])
def test_expected_pairs_are_the_stored_ones_where_they_are_certain(
    pattern: Pattern, causal: bool
) -> None:
    n = 64
    stored = visibility(pattern, n, causal=causal).nnz
    assert stored == expected_pairs(pattern, n, causal=causal)


@given(n=st.integers(2, 30), window=st.integers(1, 8))
def test_undirected_graph_joins_each_visible_pair_once(n: int, window: int) -> None:
    matrix = visibility(PSA(window, 2), n)
    graph = undirected(matrix).toarray()
    seen = matrix.toarray()
    assert np.array_equal(graph, (seen | seen.T) & ~np.eye(n, dtype=bool))
