"""What the Triton kernels are told about a batch: tables of tiles, and what plans share.

Everything is computed from plain integers or on the device, so that nothing waits for the GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.tensor_cache import TensorCache

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


# Layers whose tables or plans are made in one go: at most so many, and so many bytes. One of PSA
# takes some 100 small operations, 1.7 ms of launching on an H200 against 0.3 ms of attention at
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
