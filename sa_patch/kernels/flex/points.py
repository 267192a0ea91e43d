"""Tokens ordered by their points on a ring, and the lists of key blocks that follow.

Queries go in segments, each from one power of two (of blocks) to the next, because the reach of a
prefix-stable pattern shrinks as positions grow. A segment meets the keys below its end, in an order
of their own: so each key stands in two segments on average, and a block of queries, neighbours on
the ring, needs one contiguous range of keys (two where the ring wraps).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.flex.blocks import BlockLists
from sa_patch.patterns.ring import Ring


class PointOrder(NamedTuple):
    """Queries and keys in the order of a call."""

    queries: Tensor
    """positions, int64 ``[draws, n]``"""
    keys: Tensor
    """positions, int64 ``[draws, nk]``; a key stands once in every segment that may see it"""
    lists: BlockLists
    """``[rows, width]``, or with several draws ``[draws, rows, width]``"""


def segments(seq_len: int, block: int) -> list[tuple[int, int]]:
    """Queries ``first .. last - 1``; all but the last segment are whole blocks."""
    bounds = [0]
    while bounds[-1] < seq_len:
        bounds.append(min(seq_len, max(block, 2 * bounds[-1])))
    return list(zip(bounds, bounds[1:], strict=False))


def order_by_points(ring: Ring, block: int) -> PointOrder:
    """Segments one after the other, each by point.

    Args:
        ring: of a size; an open line has no points between its ends.
    """
    queries, keys, ranges, columns = [], [], [], 0
    for first, last in segments(ring.seq_len, block):
        points = ring.points[:, :last]
        of_queries = first + points[:, first:].argsort(dim=1, stable=True)
        of_keys = points.argsort(dim=1, stable=True)
        start, end = _needed(ring, of_queries, points.gather(1, of_keys), block)
        begin, count = _blocks_between(start, end, last, block)
        whole = -(-last // block)
        ranges.append((columns, begin, count, whole))
        columns += whole
        queries.append(of_queries)
        keys.append(of_keys)
    lists = _lists(ranges, columns)
    return PointOrder(torch.cat(queries, dim=1), torch.cat(keys, dim=1), lists)


def _needed(ring: Ring, queries: Tensor, ordered: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """First and last of the keys in reach of every block of queries: int64 ``[draws, rows]``.

    Args:
        queries: positions in the order of their points, ``[draws, m]``.
        ordered: points of the keys ``[draws, nk]``, the queries' own among them.

    Returns:
        places among the keys, from -nk (once around below) to 2 nk - 1 (once around above).
    """
    size = ring.size
    assert size is not None
    # The last block is filled up with its last query, which changes none of its extremes.
    fill = -queries.shape[1] % block
    queries = torch.cat([queries, queries[:, -1:].expand(-1, fill)], dim=1)
    own = ring.points.gather(1, queries).unflatten(1, (-1, block))
    reach = ring.reach[queries].unflatten(1, (-1, block)).amax(-1)
    # Once around to either side: a range of neighbours never has a seam.
    around = torch.cat([ordered - size, ordered, ordered + size], dim=1)
    start = torch.searchsorted(around, own[..., 0] - reach)
    end = torch.searchsorted(around, own[..., -1] + reach, right=True) - 1
    return start - ordered.shape[1], end - ordered.shape[1]


def _blocks_between(start: Tensor, end: Tensor, keys: int, block: int) -> tuple[Tensor, Tensor]:
    """The first block and the number of blocks that hold the places ``start .. end``."""
    whole = -(-keys // block)
    wraps = end // keys - start // keys
    begin, last = start % keys // block, end % keys // block
    count = last - begin + 1 + wraps * whole
    everything = (end - start + 1 >= keys) | (count > whole)
    return begin.masked_fill(everything, 0), count.masked_fill(everything, whole)


def _lists(ranges: list[tuple[int, Tensor, Tensor, int]], columns: int) -> BlockLists:
    """Lists of (blocks before the segment, first block, number of blocks, blocks in all)."""
    width = max(int(count.max()) for _, _, count, _ in ranges)
    steps = torch.arange(width, device=ranges[0][1].device)
    blocks = [before + (begin[..., None] + steps) % whole for before, begin, _, whole in ranges]
    counts = torch.cat([count for _, _, count, _ in ranges], dim=1).int()
    rows = torch.cat(blocks, dim=1).int()
    if len(rows) == 1:
        counts, rows = counts[0], rows[0]
    return BlockLists(counts, rows, columns)
