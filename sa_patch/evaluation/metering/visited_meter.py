"""Visited keys of the prefills that were run, from a few layers and a few lengths of prompts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sa_patch.kernels import Spans
from sa_patch.kernels.visited_keys import (
    BLOCK_SIZES,
    TILE_ROWS,
    VisitedKeys,
    choosing_keys,
    visited_keys,
)
from sa_patch.patterns import Full, Pattern

# Layers that stand for all, at least one of every pattern, and sequences of about one length that
# stand for others.
_LAYERS = 3
_SEQUENCES = 2
# Lengths that differ by less than a quarter of an octave count as one.
_LENGTHS_PER_OCTAVE = 4


class VisitedMeter:
    """Shares of full attention's visited keys, by layer and length.

    Args:
        patterns: the patterns of every attention layer; `Full` for stock attention.
        heads, kv_heads: of a layer.
        stock: what every layer shows unpatched, by default all keys.
    """

    def __init__(
        self,
        patterns: Mapping[int, tuple[Pattern, ...]],
        heads: int,
        kv_heads: int,
        stock: Mapping[int, Pattern] | None = None,
    ) -> None:
        self._heads, self._kv_heads = heads, kv_heads
        self._stock = dict.fromkeys(patterns, Full()) if stock is None else stock
        self._sparse = {
            layer: own[0]
            for layer, own in patterns.items()
            # Of several softmaxes side by side each reads its own keys: not counted.
            if len(own) == 1 and own[0] != self._stock[layer] and not isinstance(own[0], Full)
        }
        self._counted = all(len(own) == 1 for own in patterns.values())
        self._sparse_share = len(self._sparse) / max(1, len(patterns))
        alike: dict[Pattern, list[int]] = defaultdict(list)
        for layer in sorted(self._sparse):
            alike[self._sparse[layer]].append(layer)
        # Layers that are observed, and how many layers each of them stands for.
        self._stands_for: dict[int, float] = {}
        for own in alike.values():
            parts = max(1, round(_LAYERS * len(own) / len(self._sparse)))
            middles = {(2 * part + 1) * len(own) // (2 * parts) for part in range(parts)}
            for middle in middles:
                self._stands_for[own[middle]] = len(own) / len(middles)
        self._layers = sorted(self._stands_for)
        self._observed: dict[tuple[int, int], list[VisitedKeys]] = defaultdict(list)

    @property
    def layers(self) -> list[int]:
        """The layers that must call `observe`, because their keys are chosen by content."""
        return [layer for layer in self._layers if self._sparse[layer].reads_content]

    def observe(self, layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
        """Count what one prefill reads, of the first row, which lm-eval pads least."""
        n, start = spans.lengths[0], spans.starts[0]
        if layer not in self._layers or start or not n:
            return
        found = self._observed[layer, _length_class(n)]
        if len(found) < _SEQUENCES:
            found.append(
                visited_keys(
                    self._sparse[layer],
                    n,
                    heads=self._heads,
                    kv_heads=self._kv_heads,
                    layer=layer,
                    q=q[0, :, :n],
                    k=k[0, :, :n],
                )
            )

    def summary(self, lengths: Mapping[int, int]) -> dict[str, Any]:
        """``visited_keys`` and ``full_visited_keys`` by block size: means over tiles and layers.

        ``choosing_keys`` is the part of the former that is read to choose. None for all where
        layers have several softmaxes, or nothing that was read was observed.

        Args:
            lengths: how many prefills of each length were run.
        """
        nothing = {"visited_keys": None, "full_visited_keys": None, "choosing_keys": None}
        if not self._counted or not lengths:
            return nothing
        own, full = torch.zeros(2, len(BLOCK_SIZES), dtype=torch.float64).unbind(0)
        choosing = 0.0
        tokens = sum(n * times for n, times in lengths.items())
        for n, times in lengths.items():
            dense = _full(n, max(1, TILE_ROWS * self._kv_heads // self._heads)) * (
                n * times / tokens
            )
            known = [
                (share, self._stands_for[layer])
                for layer in self._layers
                if (share := self._share(layer, n)) is not None
            ]
            if self._layers and not known:
                return nothing
            sparse = torch.ones_like(dense)
            if known:
                shares = torch.stack([share * weight for share, weight in known])
                sparse = shares.sum(0) / sum(weight for _, weight in known)
            stock = dense * self._stock_share(n)
            own += stock - dense * self._sparse_share * (1 - sparse)
            full += stock
            chosen = [self._choosing(layer, n) * self._stands_for[layer] for layer in self._layers]
            mean = sum(chosen) / max(1, len(self._sparse))
            choosing += self._sparse_share * mean * n * times / tokens
        own += choosing
        names = [str(size) for size in BLOCK_SIZES]
        return {
            "visited_keys": dict(zip(names, own.tolist(), strict=True)),
            "full_visited_keys": dict(zip(names, full.tolist(), strict=True)),
            "choosing_keys": choosing,
        }

    def _stock_share(self, seq_len: int) -> Tensor:
        """Visited keys of the unpatched model over those of full attention, by block size."""
        ones = torch.ones(len(BLOCK_SIZES), dtype=torch.float64)
        shares = [
            ones if own.saturated(seq_len) else self._drawn(own, seq_len, layer)
            for layer, own in self._stock.items()
        ]
        return torch.stack(shares).mean(0) if shares else ones

    def _drawn(self, pattern: Pattern, seq_len: int, layer: int) -> Tensor:
        length = max(1, round(2 ** (_length_class(seq_len) / _LENGTHS_PER_OCTAVE)))
        return _drawn_share(pattern, length, layer, self._heads, self._kv_heads)

    def _choosing(self, layer: int, seq_len: int) -> float:
        """What a tile of a layer reads to choose; nothing where the pattern hides nothing."""
        pattern = self._sparse[layer]
        if pattern.saturated(seq_len):
            return 0.0
        return _choosing_keys(pattern, seq_len, self._heads, self._kv_heads)

    def _share(self, layer: int, seq_len: int) -> Tensor | None:
        """Visited keys over those of full attention, by block size; None where not observed."""
        pattern = self._sparse[layer]
        if pattern.saturated(seq_len):
            return torch.ones(len(BLOCK_SIZES), dtype=torch.float64)
        if not pattern.reads_content:
            return self._drawn(pattern, seq_len, layer)
        classes = [known for at, known in self._observed if at == layer]
        if not classes:
            return None
        nearest = min(classes, key=lambda known: abs(known - _length_class(seq_len)))
        found = self._observed[layer, nearest]
        return torch.stack([_shares(one) for one in found]).mean(0)


def _length_class(seq_len: int) -> int:
    return round(_LENGTHS_PER_OCTAVE * math.log2(seq_len))


def _shares(visited: VisitedKeys) -> Tensor:
    own, full = (
        torch.tensor([counts[size] for size in BLOCK_SIZES], dtype=torch.float64)
        for counts in (visited.keys, visited.full)
    )
    return own / full


@lru_cache(maxsize=65536)
def _drawn_share(pattern: Pattern, seq_len: int, layer: int, heads: int, kv_heads: int) -> Tensor:
    return _shares(visited_keys(pattern, seq_len, heads=heads, kv_heads=kv_heads, layer=layer))


@lru_cache(maxsize=65536)
def _choosing_keys(pattern: Pattern, seq_len: int, heads: int, kv_heads: int) -> float:
    return choosing_keys(pattern, seq_len, heads=heads, kv_heads=kv_heads)


@lru_cache(maxsize=65536)
def _full(seq_len: int, queries: int) -> Tensor:
    """Keys that full attention reads for a tile, by block size."""
    ends = torch.arange(queries, seq_len + queries, queries).clamp(max=seq_len)
    return torch.stack(
        [(-(-ends // size) * size).clamp(max=seq_len).double().mean() for size in BLOCK_SIZES]
    )
