"""How far queries see through several layers: receptive fields against depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from sa_patch.analysis.graphs import reachable_sets
from sa_patch.analysis.graphs.stacked_layers import differs_by_layer, layer_matrix
from sa_patch.analysis.graphs.visibility import check_visibility
from sa_patch.errors import UserError
from sa_patch.patterns import Pattern
from sa_patch.patterns.base import whole_number


@dataclass(frozen=True)
class ReceptiveField:
    """How many tokens a sample of queries is reached by, layer after layer.

    Args:
        pattern, seq_len, causal: what was measured.
        queries: int ``[k]``, the last query last.
        sizes: int64 ``[depth + 1, k]``: tokens in the receptive field of each query through the top
            d layers, itself among them; ``sizes[0]`` is 1.
    """

    pattern: Pattern
    seq_len: int
    causal: bool
    queries: np.ndarray
    sizes: np.ndarray

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1

    @property
    def shares(self) -> np.ndarray:
        """Receptive fields as shares of what full attention sees: float64 ``[depth + 1, k]``."""
        most = self.queries + 1 if self.causal else np.full(len(self.queries), self.seq_len)
        return np.asarray(self.sizes / most)

    @property
    def last(self) -> np.ndarray:
        """The last query's share: float64 ``[depth + 1]``."""
        return np.asarray(self.shares[:, -1])

    def average(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Mean share over queries and the half-width of its interval, ``[depth + 1]`` each.

        The interval (Student's t, with the correction for drawing from n queries without
        replacement) is for the choice of queries alone, not for another draw of the pattern; it is
        0 where all queries were taken.
        """
        shares = self.shares
        count = shares.shape[1]
        if count >= self.seq_len:
            return shares.mean(axis=1), np.zeros(len(shares))
        error = shares.std(axis=1, ddof=1) / math.sqrt(count)
        error *= math.sqrt(1 - count / self.seq_len)
        return shares.mean(axis=1), error * stats.t.isf((1 - confidence) / 2, count - 1)

    def layers_to(self, share: float) -> int | None:
        """Layers until the last query sees that share, 1.0 for everything; None if none did."""
        done = np.flatnonzero(self.last >= share)
        return int(done[0]) if len(done) else None

    def layers_for_all(self, share: float = 1.0) -> int | None:
        """Layers until every query of the sample sees that share; None if none did."""
        done = np.flatnonzero((self.shares >= share).all(axis=1))
        return int(done[0]) if len(done) else None

    def mean_layers(self) -> tuple[float, float]:
        """Layers after which the last query first sees a token, averaged over what it has reached.

        Returns:
            The mean (0 for itself), and the share of tokens that were reached at all.
        """
        new = np.diff(self.sizes[:, -1], prepend=0)
        depth = np.arange(len(new))
        return float((depth * new).sum() / new.sum()), float(self.last[-1])


def measure_receptive_field(
    pattern: Pattern,
    seq_len: int,
    depth: int,
    *,
    causal: bool = True,
    queries: int | None = None,
    seed: int = 0,
) -> ReceptiveField:
    """Follow the visible sets down from the queries of the top layer.

    Step d goes through layer ``depth - d``, so that the first steps are those of a model's last
    layers. A token keeps its place in a set (the residual stream carries it), sinks included,
    which do not see themselves. Of a pattern that differs by head, head 0 is followed.

    Args:
        pattern: the pattern of every layer, drawn anew in each where it is random.
        seq_len: number of tokens n.
        depth: layers to go down at most; no further once every query of the sample sees everything.
        causal: see `sa_patch.analysis.graphs.visibility.visibility`.
        queries: how many to sample, the last one always among them; None for all.
        seed: of the sample, and of the random queries and keys of patterns that choose by content.

    Raises:
        UserError: for numbers out of range, or a pattern that cannot be built at this length.
    """
    check_receptive_field(pattern, seq_len, depth, causal=causal, queries=queries)
    sample = _sample(seq_len, queries, seed)
    sets = reachable_sets.start(seq_len, sample)
    found = [reachable_sets.sizes(sets, len(sample))]
    most = sample + 1 if causal else seq_len
    sources = None
    for layer in reversed(range(depth)):
        if (found[-1] == most).all():
            # Nothing is left to reach; the rows that follow would all be the same.
            break
        if sources is None or differs_by_layer(pattern):
            # Two large matrices at once would double the memory.
            sources = None
            sources = _sources(pattern, seq_len, layer, causal, seed)
        sets = reachable_sets.step(sets, sources)
        found.append(reachable_sets.sizes(sets, len(sample)))
    return ReceptiveField(pattern, seq_len, causal, sample, np.stack(found))


def check_receptive_field(
    pattern: Pattern, seq_len: int, depth: int, *, causal: bool = True, queries: int | None = None
) -> None:
    """Refuse what `measure_receptive_field` could not serve, before anything slow.

    Raises:
        UserError: see there.
    """
    check_visibility(pattern, seq_len, causal=causal)
    whole_number(depth, "depth", 1)
    if queries is not None:
        # An interval needs two.
        whole_number(queries, "queries", 2)
        if queries > seq_len:
            raise UserError(f"queries must be at most n = {seq_len}, got {queries}")


def _sources(
    pattern: Pattern, seq_len: int, layer: int, causal: bool, seed: int
) -> sparse.csr_array:
    matrix = layer_matrix(pattern, seq_len, layer, causal=causal, seed=seed)
    # Without causality the relation is symmetric: its own transpose.
    return matrix.T.tocsr() if causal else matrix


def _sample(seq_len: int, queries: int | None, seed: int) -> np.ndarray:
    if queries is None or queries >= seq_len:
        return np.arange(seq_len)
    drawn = np.random.default_rng(seed).choice(seq_len - 1, queries - 1, replace=False)
    return np.append(np.sort(drawn), seq_len - 1)
