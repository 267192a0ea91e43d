"""Rings by position, and keys in the order of slots: what kernels are told besides plans."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.triton.launch_table import UNLIMITED
from sa_patch.kernels.triton.rings.draws import orders, points
from sa_patch.kernels.triton.tiles import (
    PLANS,
    Row,
    current_stream,
    layers_together,
    lengths_of,
    on_device,
)
from sa_patch.patterns import PSA, SA
from sa_patch.patterns.prefix_stable import RING_SIZE


class Rings(NamedTuple):
    """Rings whose keys other pieces leave out, as `shown_by_other_part` takes them."""

    tables: Tensor
    """int32 ``[lengths, rings, 1 + draws, padded_len]``"""
    sizes: Tensor
    """int32 ``[lengths, rings]``"""


def ring_tables(
    patterns: tuple[SA | PSA, ...],
    rows: tuple[Row, ...],
    *,
    layer: int,
    heads: int,
    device: torch.device,
) -> Rings:
    """Points and reaches of all positions, for every length of `rows`."""
    lengths = tuple(lengths_of(rows))
    per_head = any(pattern.per_head for pattern in patterns)
    draws = heads if per_head else 1
    shape = (len(lengths), len(patterns), 1 + draws, lengths[-1])
    layers = layers_together(layer, 4 * prod(shape))

    def build() -> tuple[Tensor, ...]:
        tables = torch.zeros(len(layers), *shape, dtype=torch.int32, device=device)
        sizes = torch.zeros(shape[:2], dtype=torch.int32)
        for number, length in enumerate(lengths):
            for place, pattern in enumerate(patterns):
                ring = tables[:, number, place, :, :length]
                ring[:, 0] = _reach(pattern, length, device)
                ring[:, 1:] = points(pattern, length, layers, heads, device)
                # On an open line nothing is nearer the other way around.
                size = RING_SIZE if isinstance(pattern, PSA) else length
                open_line = isinstance(pattern, SA) and not pattern.circular
                sizes[number, place] = UNLIMITED if open_line else size
        return tables, on_device(sizes, device)

    key = ("rings", patterns, lengths, layers, draws, device, current_stream(device))
    tables, sizes = PLANS.get(key, build)
    return Rings(tables[layer - layers.start], sizes)


def _reach(pattern: SA | PSA, length: int, device: torch.device) -> Tensor | int:
    return pattern.reach(length, device) if isinstance(pattern, PSA) else pattern.window - 1


def slot_ordered(x: Tensor, pattern: SA, rows: tuple[Row, ...], layer: int) -> Tensor:
    """A copy of ``x [batch, kv_heads, n, head_dim]`` whose rows stand in the order of slots.

    Serves patterns whose heads share a permutation. Rows of the batch that are not in `rows`, and
    rows beyond a length, hold anything.
    """
    lengths = lengths_of(rows)
    orders = {n: _slot_order(pattern, n, layer, x.device) for n in lengths}
    if len(lengths) == 1 and len(rows) == x.shape[0]:
        return x[:, :, orders[lengths[0]]]
    ordered = torch.empty_like(x, memory_format=torch.contiguous_format)
    for row in rows:
        ordered[row.batch, :, : row.length] = x[row.batch, :, orders[row.length]]
    return ordered


def _slot_order(pattern: SA, length: int, layer: int, device: torch.device) -> Tensor:
    """Position in every slot: int64 ``[length]``."""
    layers = layers_together(layer, 8 * length)
    key = ("orders", pattern, length, layers, device, current_stream(device))
    (together,) = PLANS.get(key, lambda: (orders(pattern, length, layers, 1, device),))
    return together[layer - layers.start, 0]
