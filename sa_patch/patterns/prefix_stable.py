"""Prefix-stable stochastic attention: random neighbours that later tokens never change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.permutation import hash_draws, hash_key
from sa_patch.patterns.ring import Ring, RingPattern

# Points on the ring: so many that distances are exact in fp32, where kernels compute with them.
RING_SIZE = 1 << 24
# Tells the draws of this pattern from the permutations of SA.
_DOMAIN = 0x505341


def ring_points(hashes: Tensor) -> Tensor:
    """The points of 62-bit hashes, in place: of their highest bits."""
    hashes >>= 38
    return hashes


@dataclass(frozen=True)
class PSA(RingPattern):
    """Query i sees itself and the earlier keys whose points lie within its reach on a ring.

    Every position j has a fixed pseudo-random point on a ring of 2^24, from (seed, layer, head, j)
    alone, and query i reaches ``floor((window - 1) * 2^23 / i)`` to either side. So it sees every
    earlier key with the same probability, `window` keys in expectation (all of them while
    ``i < window``); nothing is spent on the future, and its visible set never changes as tokens
    follow: caches and chunked prefill agree with one-shot prefill.

    Args:
        window: keys in view in expectation, the query's own among them; at least 1.
        seed: any integer; with the layer it fixes all points.
        per_head: draw points for every query head as well.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    window: int = field(metadata={"always": True})
    seed: int = field(default=0, metadata={"always": True})
    per_head: bool = False

    name: ClassVar[str] = "psa"
    summary: ClassVar[str] = "prefix-stable stochastic attention: fixed random points, w keys each"

    def ring(
        self, seq_len: int, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Ring:
        """The points and reaches of the first `seq_len` positions."""
        points = self.points(seq_len, range(layer, layer + 1), heads, device)[0]
        return Ring(points, self.reach(seq_len, device), RING_SIZE)

    def points(
        self, seq_len: int, layers: range, heads: int, device: torch.device | None = None
    ) -> Tensor:
        """The points of several layers: int64 ``[layers, heads or 1, seq_len]``."""
        hashes = hash_draws(seq_len, self.keys(seq_len, layers, heads), device)
        return ring_points(hashes).unflatten(0, (len(layers), -1))

    def keys(self, seq_len: int, layers: range, heads: int) -> list[int]:
        # Without the length: points stay where they are as tokens follow.
        return [
            hash_key(_DOMAIN, self.seed, layer, 0 if head is None else head + 1)
            for layer in layers
            for head in self.draws(heads)
        ]

    def reach(self, seq_len: int, device: torch.device | None = None) -> Tensor:
        """Distance within which each query sees: int64 ``[seq_len]``."""
        earlier = torch.arange(seq_len, device=device).clamp(min=1)
        most = RING_SIZE // 2
        return ((self.window - 1) * most // earlier).clamp(max=most)

    def pair_probability(self, seq_len: int) -> Tensor:
        """P(query i sees a given earlier key): float64 ``[seq_len]``."""
        return ((2.0 * self.reach(seq_len) + 1) / RING_SIZE).clamp(max=1)

    def saturated(self, seq_len: int) -> bool:
        return self.window >= seq_len
