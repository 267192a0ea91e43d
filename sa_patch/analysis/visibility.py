"""The visible set of one layer as a sparse matrix, built from closed forms in O(n w) memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sa_patch.analysis.content import Content
from sa_patch.analysis.ranges import visible_ranges
from sa_patch.errors import UserError
from sa_patch.patterns import PSA, SA, SWA, Full, Pattern, Union
from sa_patch.patterns.base import whole_number

# A visible pair costs 5 bytes in the matrix, as many in its transpose, and passing copies of both.
MAX_PAIRS = 400_000_000
# Visible or candidate pairs that are held as int64 at once.
_CHUNK_PAIRS = 1 << 22


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
    pairs = expected_pairs(pattern, seq_len, causal=causal)
    if pairs > MAX_PAIRS:
        raise UserError(
            f"{pattern} shows about {pairs:.2g} pairs at n = {seq_len:,}, more than the "
            f"{MAX_PAIRS:.2g} that are held in memory; take a smaller n or window"
        )


def has_two_sides(pattern: Pattern) -> bool:
    """Whether a pattern has a form without causality."""
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    return all(isinstance(part, (Full, SWA, SA)) for part in parts)


def expected_pairs(pattern: Pattern, seq_len: int, *, causal: bool = True) -> float:
    """Expected number of visible pairs of a layer, in closed form."""
    pairs = float(pattern.keys_per_query(seq_len).sum())
    # Dropping causality mirrors every pair but those of a token with itself.
    return pairs if causal else 2 * pairs - seq_len


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
    if isinstance(pattern, (SA, PSA)):
        yield from _ring_rows(pattern, seq_len, layer, causal)
        return
    widest = max(1, int(expected_pairs(pattern, seq_len, causal=causal)) // seq_len)
    rows = max(1, _CHUNK_PAIRS // (4 * widest))
    for first in range(0, seq_len, rows):
        queries = torch.arange(first, min(first + rows, seq_len))
        ranges = visible_ranges(pattern, queries, seq_len, causal=causal, content=content)
        if ranges is not None:
            yield _spread(*ranges)
        else:
            yield from _defined_rows(pattern, queries, seq_len, layer, content)


def _ring_rows(
    pattern: SA | PSA, seq_len: int, layer: int, causal: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ring = pattern.ring(seq_len, layer)
    circumference = ring.size if ring.size is not None else seq_len
    for first, last in ring.segments():
        end = last if causal else seq_len
        width = min(end, 1 + 4 * int(ring.reach[first:last].max()) * end // circumference)
        rows = max(1, _CHUNK_PAIRS // width)
        for low in range(first, last, rows):
            queries = torch.arange(low, min(low + rows, last))
            keys, meant = ring.candidates(queries, end)
            seen = meant[0] & (keys[0] <= queries[:, None]) if causal else meant[0]
            yield seen.sum(-1).numpy(), keys[0][seen].numpy()


def _defined_rows(
    pattern: Pattern, queries: Tensor, seq_len: int, layer: int, content: Content | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """By the pattern's definition, a dense mask of few rows at a time: any pattern, O(n^2) time."""
    for some in queries.split(max(1, _CHUNK_PAIRS // seq_len)):
        q, k = (None, None) if content is None else (content.q[:, some], content.k)
        mask = pattern.visible(some, seq_len, layer=layer, q=q, k=k)[0]
        yield mask.sum(-1).numpy(), mask.nonzero()[:, 1].numpy()


def _spread(first: Tensor, end: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Counts and keys of ranges ``first .. end - 1``, int64 ``[rows, ranges]``; some are empty."""
    length = (end - first).clamp(min=0)
    flat = length.flatten()
    stop = flat.cumsum(0)
    steps = torch.arange(int(stop[-1])) - (stop - flat).repeat_interleave(flat)
    keys = first.flatten().repeat_interleave(flat) + steps
    return length.sum(-1).numpy(), keys.numpy()
