"""Stochastic attention: a window over randomly permuted slots (arXiv 2604.00754)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.permutation import (
    permutation_key,
    permutation_order,
    permutation_orders,
    permutation_slots,
)
from sa_patch.patterns.ring import Ring, RingPattern


@dataclass(frozen=True)
class SA(RingPattern):
    """Query i sees the keys ``j <= i`` whose slots lie within ``window - 1`` of its own.

    ``s`` is a uniform random permutation of the n real tokens, drawn independently for every
    layer. Half of the ``2 * window - 1`` candidates lie in the future on average, so a query
    sees about `window` keys on average over the sequence and the last query up to
    ``2 * window - 1``: the "effective window" of the paper.

    Args:
        window: slots to either side, the query's own counted; at least 1.
        seed: any integer; with the layer and n it fixes the permutation.
        circular: measure slot distance around the ring, so that all slots have 2w - 1 neighbours.
        per_head: draw a permutation for every query head as well.

    Raises:
        UserError: if a parameter is not of these kinds.
    """

    window: int = field(metadata={"always": True})
    seed: int = field(default=0, metadata={"always": True})
    circular: bool = True
    per_head: bool = False

    name: ClassVar[str] = "sa"
    summary: ClassVar[str] = (
        "stochastic attention: a window over randomly permuted slots (Jin & Sui, 2604.00754)"
    )
    prefix_stable: ClassVar[bool] = False

    def slots(
        self, seq_len: int, layer: int, heads: int, device: torch.device | None = None
    ) -> Tensor:
        """Slot of every position: int64 ``[heads or 1, seq_len]``."""
        return torch.stack(
            [
                permutation_slots(seq_len, self.seed, layer, head, device)
                for head in self.draws(heads)
            ]
        )

    def order(
        self, seq_len: int, layer: int, heads: int, device: torch.device | None = None
    ) -> Tensor:
        """Position in every slot, the inverse of `slots`: int64 ``[heads or 1, seq_len]``."""
        return torch.stack(
            [
                permutation_order(seq_len, self.seed, layer, head, device)
                for head in self.draws(heads)
            ]
        )

    def orders(
        self, seq_len: int, layers: range, heads: int, device: torch.device | None = None
    ) -> Tensor:
        """`order` of several layers at once: int64 ``[layers, heads or 1, seq_len]``."""
        together = permutation_orders(seq_len, self._all_draws(layers, heads), device)
        return together.unflatten(0, (len(layers), -1))

    def keys(self, seq_len: int, layers: range, heads: int) -> list[int]:
        return [permutation_key(seq_len, *draw) for draw in self._all_draws(layers, heads)]

    def _all_draws(self, layers: range, heads: int) -> list[tuple[int, int, int | None]]:
        return [(self.seed, layer, head) for layer in layers for head in self.draws(heads)]

    def ring(
        self, seq_len: int, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Ring:
        """The slots as points of a ring, or of a line, that reaches `window` - 1 to either side."""
        slots = self.slots(seq_len, layer, heads, device)
        reach = torch.full((seq_len,), self.window - 1, device=slots.device)
        return Ring(slots, reach, seq_len if self.circular else None)

    def pair_probability(self, seq_len: int) -> Tensor:
        """P(a given pair of different tokens is within the window), before causality: float64.

        On the ring ``(2w - 2) / (n - 1)``, at most 1 (Proposition 1 of the paper, half-width
        w - 1); on a line the slots near the ends have fewer neighbours.
        """
        if seq_len < 2:
            return torch.tensor(1.0, dtype=torch.float64)
        if self.circular:
            chance = min(1.0, 2 * (self.window - 1) / (seq_len - 1))
        else:
            reach = min(self.window - 1, seq_len - 1)
            chance = reach * (2 * seq_len - reach - 1) / (seq_len * (seq_len - 1))
        return torch.tensor(chance, dtype=torch.float64)

    def saturated(self, seq_len: int) -> bool:
        farthest = seq_len // 2 if self.circular else seq_len - 1
        return self.window - 1 >= farthest
