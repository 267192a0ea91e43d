"""Stochastic attention as blocks of neighbouring slots whose rows are sorted by position.

A block of consecutive slots sees only the band of slots around it. Within a block the order of
rows is free: sorted by original position, queries and keys alike, causality makes the block
triangular, so that a tile of its first queries needs only the first of its keys. That halves
the work, which the random order of slots would spend on keys in the future.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.kernels.tiling import whole_vectors
from sa_patch.patterns import SA


@dataclass(frozen=True)
class RingTiles:
    """The blocks of one permutation draw per head group.

    Positions of value n are padding: queries beyond the last slot, keys beyond the ends of an
    open line or of the band. Being larger than every real position they come last and are never
    visible.

    Args:
        queries: int32 ``[draws, blocks, block]``, positions of each block's queries, ascending.
        query_steps: int32, like `queries`: slot of each query, counted from its block's first.
        keys: int32 ``[draws, blocks, width]``, positions of each band's keys, ascending; `width`
            is ``block + 2 * reach``, rounded up by `whole_vectors`.
        key_steps: int32, like `keys`: slot of each key, counted from its band's first. A query
            sees the real keys of ``0 <= key_step - query_step <= 2 * reach`` and
            ``key <= query``.
        reach: slots to either side that a query sees.
        seq_len: n.
    """

    queries: Tensor
    query_steps: Tensor
    keys: Tensor
    key_steps: Tensor
    reach: int
    seq_len: int

    def counts(self, tile: int) -> Tensor:
        """Leading keys of its band that each tile of `tile` queries needs.

        Returns:
            int32 ``[draws, blocks, block // tile]``: keys up to the tile's last real query.
        """
        last = self.queries[..., tile - 1 :: tile].contiguous()
        first_padding = last.clamp(max=self.seq_len - 1)
        return torch.searchsorted(self.keys, first_padding, right=True, out_int32=True)


def ring_tiles(
    pattern: SA, seq_len: int, *, layer: int, heads: int, block: int, device: torch.device
) -> RingTiles:
    """Blocks of `block` slots for sequences of `seq_len` real tokens; O(n (block + w) / block).

    Args:
        heads: number of query heads, for patterns that draw a permutation for each.
    """
    reach = pattern.window - 1
    order = pattern.order(seq_len, layer, heads, device).to(torch.int32)
    blocks = -(-seq_len // block)
    first = torch.arange(blocks, device=device)[:, None] * block
    query_slots = first + torch.arange(block, device=device)
    band = block + 2 * reach
    steps = torch.arange(whole_vectors(band), device=device)
    key_slots = first - reach + steps
    queries, query_steps = _sorted_rows(order, query_slots, query_slots < seq_len)
    real = (steps < band).expand_as(key_slots)
    if not pattern.circular:
        real = real & (key_slots >= 0) & (key_slots < seq_len)
    keys, key_steps = _sorted_rows(order, key_slots, real)
    return RingTiles(queries, query_steps, keys, key_steps, reach, seq_len)


def _sorted_rows(order: Tensor, slots: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Positions at ``slots [blocks, m]`` of every draw in ``order [draws, n]``, ascending.

    Returns:
        int32 positions and columns, both ``[draws, blocks, m]``.
    """
    seq_len = order.shape[1]
    positions = order[:, slots % seq_len].masked_fill_(~real, seq_len)
    # A ring shorter than the band repeats positions; stable, so that every run agrees.
    ordered, columns = positions.sort(dim=-1, stable=True)
    return ordered, columns.to(torch.int32)
