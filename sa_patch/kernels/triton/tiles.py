"""What the Triton kernels are told about a batch: tables of tiles, and permutations.

Everything is computed from plain integers or on the device, so that nothing waits for the GPU.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.tensor_cache import TensorCache
from sa_patch.kernels.triton.launch_table import UNLIMITED
from sa_patch.patterns import PSA, SA
from sa_patch.patterns.prefix_stable import RING_SIZE

# A 36-layer model's plans at n = 32,768 and w = 256 take 70 MiB.
CACHE_BYTES = 256 << 20
PLANS = TensorCache(CACHE_BYTES)


class Row(NamedTuple):
    """A row of the batch that a launch serves, or a sequence packed in one."""

    batch: int
    start: int
    """position of the row's first query; -c for a packed sequence that begins in column c"""
    length: int
    """its real tokens"""


def lengths_of(rows: tuple[Row, ...]) -> list[int]:
    """The different lengths of `rows`, ascending."""
    return sorted({row.length for row in rows})


def current_stream(device: torch.device) -> int:
    """What tells the streams of a device apart; 0 where there are none."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy of a table that was made from plain integers."""
    if device.type != "cuda":
        return table.to(device)
    # From pageable memory the copy would wait for all work queued before it.
    return table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=128)
def band_table(
    rows: tuple[Row, ...], query_len: int, slots: int, device: torch.device, stream: int
) -> Tensor:
    """Tiles of `slots` neighbouring queries: int32 ``[tiles, 5]``.

    Columns: row of the batch, first query, position of the row's first query, length, which of the
    lengths this is. Tiles whose queries stand last, and may see most keys, come first.

    Args:
        stream: of `current_stream`; a table is filled by work queued there.
    """
    parts = []
    for row in rows:
        begin = max(0, -row.start)
        first = torch.arange(begin, max(begin, min(query_len, row.length - row.start)), slots)
        number = lengths_of(rows).index(row.length)
        about = torch.tensor([row.start, row.length, number]).expand(len(first), 3)
        parts.append(
            torch.cat([torch.full_like(first, row.batch)[:, None], first[:, None], about], 1)
        )
    table = torch.cat(parts) if parts else torch.zeros(0, 5, dtype=torch.int64)
    order = (table[:, 1] + table[:, 2]).argsort(descending=True, stable=True)
    return on_device(table[order].to(torch.int32), device)


@lru_cache(maxsize=128)
def row_table(rows: tuple[Row, ...], batch: int, device: torch.device, stream: int) -> Tensor:
    """Of each row of the batch the position of its first query, and which length it has: int32
    ``[batch, 2]``; zeros for those not in `rows`."""
    table = torch.zeros(batch, 2, dtype=torch.int32)
    for row in rows:
        table[row.batch, 0] = row.start
        table[row.batch, 1] = lengths_of(rows).index(row.length)
    return on_device(table, device)


class Rings(NamedTuple):
    """Rings whose keys other pieces leave out, as `shown_by_other_part` takes them."""

    tables: Tensor
    """int32 ``[lengths, rings, 1 + draws, padded_len]``"""
    sizes: Tensor
    """int32 ``[lengths, rings]``"""


# Layers whose tables or plans are made in one go: at most so many, and so many bytes. One takes
# some 100 small operations, 1.7 ms of launching on an H200 against 0.3 ms of attention at
# n = 8,192.
_LAYERS_TOGETHER, _BYTES_TOGETHER = 24, 32 << 20
_expected_layers = _LAYERS_TOGETHER


def expect_layers(count: int) -> None:
    """Plan at least so many layers in one go, all of a model."""
    global _expected_layers
    # A deeper model that was patched before may still run.
    _expected_layers = max(_expected_layers, count)


def layers_together(layer: int, layer_bytes: int) -> range:
    """The layers that are planned with this one, which are the same for each of them.

    A model asks layer after layer.
    """
    count = max(1, min(_expected_layers, _BYTES_TOGETHER // max(1, layer_bytes)))
    first = layer // count * count
    return range(first, first + count)


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


def points(
    pattern: SA | PSA, length: int, layers: range, heads: int, device: torch.device
) -> Tensor:
    """Points of several layers: int64 ``[layers, heads or 1, length]``, remembered."""
    if isinstance(pattern, SA):
        # The slot of each position, where orders hold the position in each slot.
        return pattern.orders(length, layers, heads, device).argsort(dim=-1)
    draws = len(pattern.draws(heads))
    key = ("points", pattern, length, layers, draws, device, current_stream(device))
    return PLANS.get(key, lambda: (pattern.points(length, layers, heads, device),))[0]


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
    key = ("order", pattern, length, layer, device, current_stream(device))
    return PLANS.get(key, lambda: (pattern.order(length, layer, 1, device)[0],))[0]
