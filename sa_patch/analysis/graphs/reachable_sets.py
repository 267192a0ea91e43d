"""Sets of tokens carried along the edges of a graph, 64 starting tokens to a machine word."""

from __future__ import annotations

import numpy as np
from scipy import sparse

WORD = 64
# Words that are gathered at once: bounds the memory of a step to 128 MiB.
_GATHER_WORDS = 1 << 24


def start(seq_len: int, tokens: np.ndarray) -> np.ndarray:
    """The sets ``{token}``, one for each token.

    Args:
        seq_len: number of tokens n.
        tokens: int ``[k]``.

    Returns:
        uint64 ``[ceil(k / 64), seq_len]``: bit ``b`` of word ``[w, j]`` says that j is in set
        number ``64 w + b``.
    """
    sets = np.zeros((-(-len(tokens) // WORD), seq_len), dtype=np.uint64)
    number = np.arange(len(tokens))
    bits = np.uint64(1) << (number % WORD).astype(np.uint64)
    np.bitwise_or.at(sets, (number // WORD, tokens), bits)
    return sets


def step(sets: np.ndarray, sources: sparse.csr_array) -> np.ndarray:
    """Each set together with all that its members see.

    Args:
        sets: uint64 ``[words, n]`` of `start`.
        sources: bool ``[n, n]``, row j the tokens that see j: the transpose of a visibility matrix.

    Returns:
        uint64 ``[words, n]``; a set keeps its members, as the residual stream does.
    """
    grown = sets.copy()
    indptr, indices = sources.indptr.astype(np.int64), sources.indices
    rows = max(1, _GATHER_WORDS * sets.shape[1] // max(1, len(indices)))
    for first in range(0, sets.shape[1], rows):
        last = min(first + rows, sets.shape[1])
        own = indices[indptr[first] : indptr[last]]
        # reduceat gives an empty row the next row's first word, so it is left out.
        filled = np.flatnonzero(np.diff(indptr[first : last + 1])) + first
        if len(filled):
            for words, out in zip(sets, grown, strict=True):
                out[filled] |= np.bitwise_or.reduceat(words[own], indptr[filled] - indptr[first])
    return grown


def sizes(sets: np.ndarray, count: int) -> np.ndarray:
    """Members of each of the first `count` sets: int64 ``[count]``."""
    found = np.empty(count, dtype=np.int64)
    for number in range(count):
        word, bit = sets[number // WORD], np.uint64(number % WORD)
        found[number] = np.count_nonzero(word & (np.uint64(1) << bit))
    return found
