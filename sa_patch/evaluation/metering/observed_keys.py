"""Visible keys counted where they are chosen, on a sample of the queries of each prefill."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.kernels import Spans
from sa_patch.patterns import Pattern, split_tail

SAMPLED_QUERIES = 64


@dataclass
class _Sums:
    """Sums over the prefills of one layer, means over heads."""

    tokens: float = 0.0
    visible: float = 0.0
    sequences: int = 0
    last: float = 0.0


class Observed:
    """What was seen in the layers that were observed."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sums] = defaultdict(_Sums)

    def add(self, pattern: Pattern, layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
        """Count the keys that a sample of the queries of each row sees, and the last one.

        A prefill of n tokens stands for n times the mean of its sample; its last queries, where
        these see everything, few and far from the mean, are counted by themselves. Rows that do
        not start at position 0 are no prefill, and are left out.
        """
        rest = split_tail(pattern)[0]
        for row, (n, start) in enumerate(zip(spans.lengths, spans.starts, strict=True)):
            if start or not n:
                continue
            sparse = n - pattern.dense_end(n)
            last_tile = torch.arange((n - 1) // rest.shared_queries * rest.shared_queries, n)
            sampled = sampled_positions(sparse, rest.shared_queries)
            places = torch.cat([sampled, last_tile]).to(q.device)
            queries = rest.queries_read(q[row, :, :n], places)
            seen = rest.visible(
                places, n, layer=layer, heads=q.shape[1], q=queries, k=k[row, :, :n]
            )
            counts = seen.sum(-1).double().mean(0)
            sums = self._sums[layer]
            sums.tokens += n
            if sparse:
                sums.visible += sparse * float(counts[: len(sampled)].mean())
            sums.visible += (n * (n + 1) - sparse * (sparse + 1)) / 2
            sums.sequences += 1
            sums.last += n if sparse < n else float(counts[-1])

    def add_dense(self, layer: int, seq_len: int) -> None:
        """Count a prefill of which the pattern hides nothing, and which need not be run."""
        sums = self._sums[layer]
        sums.tokens += seq_len
        sums.visible += seq_len * (seq_len + 1) / 2
        sums.sequences += 1
        sums.last += seq_len

    def means(self, layer: int) -> tuple[float, float]:
        """Mean keys per query, and mean keys of the last query, of a layer's prefills.

        Raises:
            RuntimeError: if none was observed.
        """
        sums = self._sums.get(layer)
        if sums is None:
            raise RuntimeError(f"no prefill of layer {layer} was observed")
        return sums.visible / sums.tokens, sums.last / sums.sequences


def sampled_positions(seq_len: int, shared: int = 1) -> Tensor:
    """Evenly spaced query positions, the middles of equal parts; all of a short sequence.

    Args:
        shared: queries that share their choices; then they are taken in whole tiles.
    """
    tiles, wanted = -(-seq_len // shared), max(1, SAMPLED_QUERIES // shared)
    chosen = torch.arange(tiles)
    if tiles > wanted:
        chosen = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * tiles / wanted).long()
    positions = (chosen[:, None] * shared + torch.arange(shared)).flatten()
    return positions[positions < seq_len]
