"""What the Triton kernels are told about a batch: tables of tiles, and permutations as tiles.

Everything is computed from plain integers or on the device, so that nothing waits for the GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.ring_tiles import RingTiles, ring_tiles
from sa_patch.kernels.tensor_cache import TensorCache
from sa_patch.patterns import SA

# A 36-layer model's plans at n = 32,768 and w = 256 take 60 MiB.
CACHE_BYTES = 256 << 20


class Row(NamedTuple):
    """A row of the batch that a launch serves."""

    batch: int
    start: int
    """position of its first query"""
    length: int
    """its real tokens"""


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table.to(device)
    # From pageable memory the copy would wait for all work queued before it.
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=128)
def band_table(
    rows: tuple[Row, ...], query_len: int, slots: int, device: torch.device, stream: int
) -> Tensor:
    """Tiles of `slots` neighbouring queries: int32 ``[tiles, 5]``.

    Columns: row of the batch, first query, position of the row's first query, length, 0. Tiles
    whose queries stand last, and may see most keys, come first.

    Args:
        stream: of `current_stream`; a table is filled by work queued there.
    """
    parts = []
    for row in rows:
        first = torch.arange(0, max(0, min(query_len, row.length - row.start)), slots)
        about = torch.tensor([row.start, row.length, 0]).expand(len(first), 3)
        parts.append(
            torch.cat([torch.full_like(first, row.batch)[:, None], first[:, None], about], 1)
        )
    table = torch.cat(parts) if parts else torch.zeros(0, 5, dtype=torch.int64)
    order = (table[:, 1] + table[:, 2]).argsort(descending=True, stable=True)
    return _on_device(table[order].to(torch.int32), device)


@lru_cache(maxsize=128)
def ring_table(
    rows: tuple[Row, ...], block: int, draws: int, device: torch.device, stream: int
) -> Tensor:
    """Blocks of `block` slots of every row: int32 ``[blocks, 5]``.

    Columns: row of the batch, block of the concatenated plans of `ring_plan`, blocks of one draw,
    length, first slot.
    """
    begins, total = {}, 0
    for length in ring_lengths(rows):
        begins[length] = total
        total += draws * -(-length // block)
    parts = []
    for row in rows:
        number = torch.arange(-(-row.length // block))
        same = torch.ones_like(number)
        columns = [
            same * row.batch,
            number + begins[row.length],
            same * len(number),
            same * row.length,
            number * block,
        ]
        parts.append(torch.stack(columns, 1))
    return _on_device(torch.cat(parts).to(torch.int32), device)


def ring_lengths(rows: tuple[Row, ...]) -> list[int]:
    """The different lengths of `rows`, in the order of their plans."""
    return sorted({row.length for row in rows})


def current_stream(device: torch.device) -> int:
    """What tells the streams of a device apart; 0 where there are none."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


class RingPlan(NamedTuple):
    """Plans of one or several lengths, one after the other.

    The fields of `RingTiles`, each ``[all blocks of all draws, ...]``, and `counts` int32, like
    `queries`: the leading keys of the band up to each query.
    """

    queries: Tensor
    query_steps: Tensor
    keys: Tensor
    key_steps: Tensor
    counts: Tensor


PLANS = TensorCache(CACHE_BYTES)


def ring_plan(
    pattern: SA,
    rows: tuple[Row, ...],
    *,
    layer: int,
    heads: int,
    block: int,
    device: torch.device,
) -> RingPlan:
    """The plans of all lengths of `rows`, concatenated in the order of `ring_table`.

    Args:
        heads: query heads, each of which has a draw of its own where `pattern.per_head`.
        block: slots of a block.
    """
    plans = [
        _plan_of_length(pattern, length, layer, heads, block, device)
        for length in ring_lengths(rows)
    ]
    if len(plans) == 1:
        return plans[0]
    return RingPlan(*(torch.cat(parts) for parts in zip(*plans, strict=True)))


def _plan_of_length(
    pattern: SA, length: int, layer: int, heads: int, block: int, device: torch.device
) -> RingPlan:
    draws = len(pattern.draws(heads))
    key = (pattern, length, layer, draws, block, device, current_stream(device))

    def build() -> tuple[Tensor, ...]:
        tiles: RingTiles = ring_tiles(
            pattern, length, layer=layer, heads=heads, block=block, device=device
        )
        counts = torch.searchsorted(tiles.keys, tiles.queries, right=True, out_int32=True)
        parts = (tiles.queries, tiles.query_steps, tiles.keys, tiles.key_steps, counts)
        return tuple(part.flatten(0, 1) for part in parts)

    return RingPlan(*PLANS.get(key, build))


def slot_ordered(x: Tensor, pattern: SA, rows: tuple[Row, ...], layer: int) -> Tensor:
    """A copy of ``x [batch, kv_heads, n, head_dim]`` whose rows stand in the order of slots.

    Serves patterns whose heads share a permutation. Rows of the batch that are not in `rows`, and
    rows beyond a length, hold anything.
    """
    lengths = ring_lengths(rows)
    orders = {n: _slot_order(pattern, n, layer, x.device) for n in lengths}
    if len(lengths) == 1 and len(rows) == x.shape[0]:
        return x[:, :, orders[lengths[0]]]
    ordered = torch.empty_like(x, memory_format=torch.contiguous_format)
    for row in rows:
        ordered[row.batch, :, : row.length] = x[row.batch, :, orders[row.length]]
    return ordered


def _slot_order(pattern: SA, length: int, layer: int, device: torch.device) -> Tensor:
    """Position in every slot: int64 ``[length]``."""
    key = ("order", pattern, length, layer, device, current_stream(device))
    return PLANS.get(key, lambda: (pattern.order(length, layer, 1, device)[0],))[0]
