"""Tiles of queries on a ring whose reach may differ from query to query, and their ranges of keys.

A tile holds queries that are neighbours on the ring and lie in one segment of positions. It needs
the keys before the segment's end in one contiguous range of the ring: the queries' own stretch
and, to either side, the farthest reach. T queries that see w keys each, in a segment that ends at
g times its beginning, share about ``g (1 + s) w`` such keys, where ``T = (g - 1) s w``: least for
``g - 1 = s = sqrt(T / w)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.patterns.ring import Ring

# A segment ends at this many times its beginning at most, however little its queries see.
_MOST_GROWTH = 4.0
# What is left over at the beginning joins the first segment up to this growth.
_LEFT_OVER = 1.2
# A place out of every reach, both ways round.
_FAR = 1 << 27
# Points of one segment, and places one turn on, lie below the next segment's.
_SEGMENT = 1 << 40


@dataclass(frozen=True)
class RingRanges:
    """Tiles of the last queries of a sequence, and the range of keys that each needs.

    Those that need about as many keys stand together, those that need fewest first. Places are
    points, less the middle of a tile and unrolled, so that no range has a seam; those that matter
    are whole numbers of at most 2^24, exact in fp32.

    Args:
        queries: int64 ``[draws, tiles, tile]``, positions.
        query_places: int64, like `queries`.
        middles: int64 ``[draws, tiles]``, the points that places are counted from.
        first: int64 ``[draws, tiles]``, the index in `keys` where each tile's range begins.
        past: int64 ``[tiles]``, the index where its segment ends, and its ring closes.
        around: int64 ``[tiles]``, how many keys its segment has.
        counts: int64 ``[draws, tiles]``, how many keys its range has, no key twice.
        widths: the most keys that each tile needs in any draw, ascending.
        wide: of each tile, whether its range is the whole ring, so that a query may be nearer to
            a key the other way round.
        keys: int64 ``[draws, all]``, positions in ring order, segment after segment.
        key_points: int64, like `keys`.
        turn: distance once around the ring.
    """

    queries: Tensor
    query_places: Tensor
    middles: Tensor
    first: Tensor
    past: Tensor
    around: Tensor
    counts: Tensor
    widths: list[int]
    wide: list[bool]
    keys: Tensor
    key_points: Tensor
    turn: int

    def range_of(self, tiles: slice, width: int) -> tuple[Tensor, Tensor]:
        """The ranges of some tiles, widened to `width` keys.

        Args:
            tiles: m of them.

        Returns:
            Positions and places, both int64 ``[draws, m, width]``. What was added has places out
            of every reach.
        """
        steps = torch.arange(width, device=self.keys.device)
        index = self.first[:, tiles, None] + steps
        closed = index >= self.past[tiles, None]
        index -= closed * self.around[tiles, None]
        index = index.clamp_(max=self.keys.shape[1] - 1).flatten(1)
        positions = self.keys.gather(1, index).view(closed.shape)
        places = self.key_points.gather(1, index).view(closed.shape)
        places += closed * self.turn - self.middles[:, tiles, None]
        return positions, places.masked_fill_(steps >= self.counts[:, tiles, None], _FAR)


def ring_ranges(ring: Ring, low: int, first_key: int, latest: Tensor, tile: int) -> RingRanges:
    """Tiles of the queries ``low .. n - 1``, a multiple of `tile`.

    Args:
        first_key: the first key that may be shown to any query.
        latest: int64 ``[n]``, ascending: the last one for each query, at least `first_key`.
    """
    device, draws = latest.device, len(ring.points)
    bounds = torch.tensor(_bounds(ring, low, tile))
    sizes = bounds.diff()
    last_keys = latest[(bounds[1:] - 1).to(device)]
    around = last_keys + 1 - first_key
    past = around.cumsum(0)
    # The segment of each tile.
    of_tile = torch.arange(len(sizes)).repeat_interleave(sizes // tile).to(device)
    of_query = of_tile.repeat_interleave(tile)
    query_order = (ring.points[:, low:] + of_query * _SEGMENT).argsort(dim=1, stable=True)
    queries = (query_order + low).view(draws, -1, tile)
    order = ring.points.argsort(dim=1, stable=True)[:, None]
    meant = order <= last_keys[:, None]
    if first_key:
        meant &= order >= first_key
    keys = order.expand_as(meant).masked_select(meant).view(draws, -1)
    key_points = ring.points.gather(1, keys)
    of_key = torch.arange(len(sizes), device=device).repeat_interleave(around)
    ordered = key_points + of_key * _SEGMENT
    return _ranges(ring, queries, of_tile, keys, key_points, ordered, around, past)


def _bounds(ring: Ring, low: int, tile: int) -> list[int]:
    """Where segments begin and end, from `low` to n, in whole tiles."""
    end = ring.seq_len
    size = ring.size or ring.seq_len
    bounds = [end]
    while end > low:
        seen = 1 + end * (2 * int(ring.reach[end - 1]) + 1) / size
        growth = min(_MOST_GROWTH, 1 + math.sqrt(tile / seen))
        length = tile * max(1, round(end * (1 - 1 / growth) / tile))
        # What is left, if it hardly grows, is no segment of its own.
        end = end - length if end - length > _LEFT_OVER * low else low
        bounds.append(end)
    return bounds[::-1]


def _ranges(
    ring: Ring,
    queries: Tensor,
    of_tile: Tensor,
    keys: Tensor,
    key_points: Tensor,
    ordered: Tensor,
    around: Tensor,
    past: Tensor,
) -> RingRanges:
    """Look up the range of each tile.

    Args:
        queries: int64 ``[draws, tiles, tile]``, in ring order.
        of_tile: int64 ``[tiles]``, the segment of each.
        keys, key_points: of all segments, in ring order, int64 ``[draws, all]``.
        ordered: their points in ascending numbers.
        around, past: int64 ``[segments]``, how many keys each has, and where in `keys` it ends.
    """
    turn = ring.size or ring.seq_len
    points = ring.points.gather(1, queries.flatten(1)).view(queries.shape)
    reach = ring.reach[queries]
    middles = (points[..., 0] + points[..., -1]) // 2
    lowest, beyond = (points - reach).amin(-1), (points + reach).amax(-1) + 1
    if ring.size is None:
        wide = torch.zeros_like(of_tile, dtype=torch.bool)
        turns = torch.zeros_like(lowest)
        lowest, beyond = lowest.clamp_(min=0), beyond.clamp_(max=turn)
    else:
        wide = (beyond - lowest > turn).any(0)
        lowest = torch.where(wide, middles - turn // 2, lowest)
        beyond = torch.where(wide, lowest + turn, beyond)
        turns = lowest.div(turn, rounding_mode="floor")
        lowest, beyond = lowest - turns * turn, beyond - turns * turn
    closes = beyond > turn
    of_limits = of_tile * _SEGMENT
    first = torch.searchsorted(ordered, lowest + of_limits)
    behind = torch.searchsorted(ordered, beyond - closes * turn + of_limits)
    counts = behind - first + closes * around[of_tile]
    widths, ranked = counts.amax(0).sort()
    return RingRanges(
        queries=queries[:, ranked],
        query_places=(points - middles[..., None])[:, ranked],
        middles=(middles - turns * turn)[:, ranked],
        first=first[:, ranked],
        past=past[of_tile][ranked],
        around=around[of_tile][ranked],
        counts=counts[:, ranked],
        widths=widths.tolist(),
        wide=wide[ranked].tolist(),
        keys=keys,
        key_points=key_points,
        turn=turn,
    )
