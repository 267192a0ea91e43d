"""The visible set of one layer as a sparse matrix, built from closed forms in O(n w) memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse
from torch import Tensor

from sa_patch.analysis.graphs.content_choices import Content, visible_ranges
from sa_patch.errors import UserError
from sa_patch.patterns import Pattern, Union
from sa_patch.patterns import visible_pairs as pairs
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.visible_pairs import expected_pairs as expected_pairs
from sa_patch.patterns.visible_pairs import has_two_sides as has_two_sides

# A visible pair costs 5 bytes in the matrix, as many in its transpose, and passing copies of both.
MAX_PAIRS = 400_000_000


def visibility(
    pattern: Pattern,
    seq_len: int,
    *,
    layer: int = 0,
    causal: bool = True,
    content: Content | None = None,
) -> sparse.csr_array:
    """Which keys each query of one layer sees, for query head 0.

    Args:
        pattern: the layer's pattern.
        seq_len: number of tokens n, at least 1.
        layer: index of the layer, for patterns drawn anew in each layer.
        causal: False drops ``j <= i``: full attention sees everything, a sliding window and
            stochastic attention see as far ahead as behind (by distance, by slot distance).
        content: queries and keys for patterns that choose by content; None for none.

    Returns:
        bool ``[seq_len, seq_len]``, row i the keys of query i; rows are not sorted.

    Raises:
        UserError: if the pattern has no non-causal form, needs content and got none, or shows too
            many pairs to hold; before anything is built.
    """
    check_visibility(pattern, seq_len, causal=causal)
    if pattern.reads_content and content is None:
        raise UserError(f"{pattern} chooses keys by content: give queries and keys")
    if isinstance(pattern, Union):
        parts = (
            visibility(part, seq_len, layer=layer, causal=causal, content=content)
            for part in pattern.parts
        )
        first = next(parts)
        for part in parts:
            first = first + part  # of booleans: or
        return first
    counts, keys = [], []
    for per_query, seen in _rows(pattern, seq_len, layer, causal, content):
        counts.append(per_query)
        keys.append(seen.astype(np.int32))
    total = np.concatenate(counts)
    indptr = np.zeros(seq_len + 1, dtype=np.int32)
    np.cumsum(total, out=indptr[1:])
    indices = np.concatenate(keys)
    return sparse.csr_array(
        (np.ones(len(indices), dtype=bool), indices, indptr), shape=(seq_len, seq_len)
    )


def check_visibility(pattern: Pattern, seq_len: int, *, causal: bool = True) -> None:
    """Refuse what `visibility` could not build, before anything slow.

    Raises:
        UserError: for a length that is none, no non-causal form where one is wanted, or too many
            pairs.
    """
    whole_number(seq_len, "n", 1)
    if not causal and not has_two_sides(pattern):
        raise UserError(
            f"{pattern} has no non-causal form (full, swa, sa and unions of them have one); "
            "measure it causally"
        )
    shown = expected_pairs(pattern, seq_len, causal=causal)
    if shown > MAX_PAIRS:
        raise UserError(
            f"{pattern} shows about {shown:.2g} pairs at n = {seq_len:,}, more than the "
            f"{MAX_PAIRS:.2g} that are held in memory; take a smaller n or window"
        )


def undirected(matrix: sparse.csr_array) -> sparse.csr_array:
    """The graph in which two tokens are joined if one sees the other, without loops.

    Args:
        matrix: bool ``[n, n]`` of `visibility`.

    Returns:
        bool ``[n, n]``, symmetric, with an empty diagonal.
    """
    both = (matrix + matrix.T).tocoo()
    off = both.row != both.col
    row, col = both.row[off], both.col[off]
    data = np.ones(len(row), dtype=bool)
    return sparse.csr_array((data, (row, col)), shape=matrix.shape)


def _rows(
    pattern: Pattern, seq_len: int, layer: int, causal: bool, content: Content | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys per query int64 ``[rows]``, and the keys themselves one after the other, in chunks."""
    if not pattern.reads_content:
        for counts, keys in pairs.pair_rows(pattern, seq_len, layer=layer, causal=causal):
            yield counts.numpy(), keys.numpy()
        return
    assert content is not None
    for queries in pairs.query_chunks(pattern, seq_len, causal=causal):
        ranges = visible_ranges(pattern, queries, seq_len, causal=causal, content=content)
        if ranges is not None:
            counts, keys = pairs.spread(*ranges)
            yield counts.numpy(), keys.numpy()
        else:
            yield from _defined_rows(pattern, queries, seq_len, layer, content)


def _defined_rows(
    pattern: Pattern, queries: Tensor, seq_len: int, layer: int, content: Content
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """By the pattern's definition, a dense mask of few rows at a time: any pattern, O(n^2) time."""
    shared = pattern.shared_queries
    for some in queries.split(max(1, pairs.CHUNK_PAIRS // seq_len // shared) * shared):
        q = pattern.queries_read(content.q, some)
        mask = pattern.visible(some, seq_len, layer=layer, q=q, k=content.k)[0]
        yield mask.sum(-1).numpy(), mask.nonzero()[:, 1].numpy()
