"""What a call over a ring needs: the order of queries and keys, and tables in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.flex.blocks import BlockLists, ring_blocks
from sa_patch.kernels.flex.kernel import LocalWindow, Table, block_size
from sa_patch.kernels.flex.points import order_by_points, segments
from sa_patch.kernels.flex.tables import (
    NOWHERE,
    Tables,
    absent_keys,
    near,
    numbers,
    plans,
    table,
)
from sa_patch.patterns import PSA, SA


class RingPlan(NamedTuple):
    """Queries, keys and tables of a call over a ring."""

    queries: Tensor
    """positions in the call's order, int32 ``[draws, n]``"""
    keys: Tensor
    """positions, int32 ``[draws, nk]``; a key may stand several times"""
    places: Tensor
    """of positions among the queries, int32 ``[draws, n]``"""
    tables: Tensor
    positions: tuple[Table, Table]
    reach: tuple[Tensor, Tensor] | LocalWindow
    """as `flex_kernel.ring` takes it"""
    others: tuple[LocalWindow, ...]
    lists_name: Hashable
    """names the lists in caches"""
    lists: BlockLists


def ring_plan(
    ring: SA | PSA,
    others: tuple[SA | PSA, ...],
    seq_len: int,
    layer: int,
    heads: int,
    device: torch.device,
) -> RingPlan:
    """The plan of a ring that leaves out what `others` see."""
    draws, block = len(ring.draws(heads)), block_size(device)
    drawn = dataclasses.replace(ring, window=1) if isinstance(ring, SA) else ring
    # How many heads there are matters only to a pattern that draws for each.
    apart = heads if any(part.per_head for part in (ring, *others)) else 1
    name = ("ring", drawn, others, layer, apart, seq_len, device)
    places, *rest = plans.get(name, lambda: _drawn(ring, others, seq_len, layer, heads, device))
    reach: tuple[Tensor, Tensor] | LocalWindow
    lists_name: Hashable
    if isinstance(ring, SA):
        key_count = seq_len
        lists_name, reach, lists = _bands(ring, seq_len, device)
    else:
        key_count = sum(last for _, last in segments(seq_len, block))
        counts, blocks, *rest = rest
        lists_name, lists = name, BlockLists(counts, blocks, -(-key_count // block))
    tables, noted = rest[0], iter(rest[1:])
    positions = table(noted), table(noted)
    if isinstance(ring, PSA):
        reach = near(noted)
    within = tuple(near(noted) for _ in others)
    queries = tables[: draws * seq_len].view(draws, seq_len)
    rows = key_count + absent_keys(key_count, block)
    keys = tables[draws * seq_len :][: draws * rows].view(draws, rows)[:, :key_count]
    return RingPlan(queries, keys, places, tables, positions, reach, within, lists_name, lists)


def _drawn(
    ring: SA | PSA,
    others: tuple[SA | PSA, ...],
    seq_len: int,
    layer: int,
    heads: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """What depends on the layer: places, for points the lists, tables and their numbers."""
    block, tables = block_size(device), Tables(device)
    listed: tuple[Tensor, ...] = ()
    if isinstance(ring, SA):
        # Neighbours in the order of slots are neighbours on the ring.
        queries = keys = ring.order(seq_len, layer, heads, device)
    else:
        queries, keys, lists = order_by_points(ring.ring(seq_len, layer, heads, device), block)
        listed = lists.counts, lists.blocks
    # Those that are not there reach beyond the last block, to the sentinel and with it.
    fill = absent_keys(keys.shape[1], block)
    keys = torch.nn.functional.pad(keys, (0, fill), value=NOWHERE)
    tables.add_by_position(queries)
    tables.add_by_position(keys)
    for other in others if isinstance(ring, SA) else (ring, *others):
        tables.add_local_window(other.ring(seq_len, layer, heads, device), queries, keys)
    return queries.argsort(dim=1).int(), *listed, *tables.joined()


def _bands(
    ring: SA, seq_len: int, device: torch.device
) -> tuple[Hashable, tuple[Tensor, Tensor], BlockLists]:
    """Lists by slot and (reach, size), which all layers share."""
    block, reach = block_size(device), ring.window - 1

    def build() -> tuple[Tensor, ...]:
        lists = ring_blocks(seq_len, reach, ring.circular, block).to(device)
        return lists.counts, lists.blocks

    name = ("bands", reach, ring.circular, seq_len, device)
    counts, blocks = plans.get(name, build)
    size = seq_len if ring.circular else NOWHERE
    lists = BlockLists(counts, blocks, -(-seq_len // block))
    distance, around = numbers("reach", (reach, size), device)
    return name, (distance, around), lists
