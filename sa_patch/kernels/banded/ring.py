"""Stochastic attention on any ring in pure torch: tiles of queries against ranges of the ring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.kernels.banded.outputs import OutputWriter
from sa_patch.kernels.banded.ring_ranges import RingRanges, ring_ranges
from sa_patch.kernels.merge import hidden_score
from sa_patch.kernels.tiling import by_rows, take_rows, whole_vectors
from sa_patch.patterns.base import Rule
from sa_patch.patterns.ring import Ring

# What a hidden key's score loses at least; a power of two, so that its products are exact.
_HIDDEN = 2.0**100
# Tiles of a single row that go into one call, at most.
_TOGETHER = 8
# Keys of ranges that are looked up at once.
_LOOKED_UP = 1 << 15
# Queries that gather their keys together, where they see but a small share of all.
_FEW = 8
# Pairs of queries and keys whose membership is looked up at once.
_PAIRS = 1 << 20


@dataclass(frozen=True)
class RingPart:
    """What queries see of a ring, less what other parts show them.

    Args:
        ring: points and reaches of all n tokens.
        sinks: the first key that it may show.
        latest: int64 ``[n]``, the last key that it may show each query, at most its own;
            ascending.
        unless: names further keys that it may not show.
        dense: how many first queries have the whole ring within reach.
    """

    ring: Ring
    sinks: int
    latest: Tensor
    unless: Rule | None = None
    dense: int = 0

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Membership of pairs, as `Rule`, but for any j."""
        seen = self.ring.rule()(i, j) & (j >= self.sinks) & (j <= self.latest[i])
        return seen if self.unless is None else seen & ~self.unless(i, j)


def attend_ranges(
    part: RingPart,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    scale: float,
    sums: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries at ``start .. start + nq - 1`` over what they see of a ring.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``, rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``, ``n = start + nq``.
        sums: whether to return the log-sum-exps too; without, every query must see a key.
        softcap: of `Softmax`; goes with sums.

    Returns:
        Output like q and log-sum-exps ``[batch, q_heads, nq]``. Beyond these it holds a copy of k
        and v, O(n) indices, and a few ranges at a time.
    """
    seq_len = k.shape[2]
    out = OutputWriter(q, k, v, scale=scale, sums=sums, softcap=softcap)
    # Whoever comes before may be shown nothing.
    first = max(start, int(torch.searchsorted(part.latest, part.sinks)))
    if first > start:
        out.nothing(0, min(first, seq_len) - start)
    tile = _tile(q.dtype)
    dense = min(max(first, part.dense), seq_len)
    whole = dense + max(0, seq_len - dense) % tile
    if dense > first == start == part.sinks == 0 and part.unless is None and not sums:
        # The part stands alone: plain causal attention.
        out.write(
            out.attend(q[:, :, :dense], k[:, :, :dense], v[:, :, :dense], None, causal=True), 0
        )
        first = dense
    if whole > first:
        _masked(part, out, q, k, v, start=start, low=first, high=whole)
    if whole < seq_len:
        ranges = ring_ranges(part.ring, whole, part.sinks, part.latest, tile)
        _tiles(part, ranges, out, q, by_rows(k), by_rows(v), start=start)
    return out.result()


def _tile(dtype: torch.dtype) -> int:
    return 32 if dtype.itemsize >= 4 else 64


def _masked(
    part: RingPart,
    out: OutputWriter,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    low: int,
    high: int,
) -> None:
    """Queries at ``low .. high - 1`` against all keys that may be shown, under a mask."""
    keys = torch.arange(part.sinks, int(part.latest[high - 1]) + 1, device=q.device)
    k, v = (x[:, :, part.sinks : part.sinks + len(keys)] for x in (k, v))
    last = torch.full((1, 1, 1), high - 1, device=q.device)
    most = int(part.sees(last, keys[None, None]).sum(-1).max())
    few = 2 * _FEW * most <= len(keys)
    step = _FEW if few else max(1, _PAIRS // (len(part.ring.points) * len(keys)))
    for first in range(low, high, step):
        queries = torch.arange(first, min(first + step, high), device=q.device)
        seen = part.sees(queries[None, :, None], keys[None, None])
        own = q[:, :, first - start : first - start + len(queries)]
        k_near, v_near = k, v
        if few:
            places, seen = _needed(seen)
            k_near, v_near = (take_rows(x, places, q.shape[1]) for x in (k, v))
        out.write(out.attend(own, k_near, v_near, seen[None]), first - start)


def _needed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """The keys that any query sees: ``seen [draws, queries, keys]``.

    Returns:
        Their places int64 ``[draws, m]``, and what is seen of them: bool ``[draws, queries, m]``.
    """
    draw, key = seen.any(1).nonzero(as_tuple=True)
    counts = torch.bincount(draw, minlength=len(seen))
    steps = torch.arange(int(counts.max()), device=seen.device)
    places = torch.zeros(len(seen), len(steps), dtype=torch.int64, device=seen.device)
    real = steps < counts[:, None]
    places[real] = key
    visible = seen.gather(2, places[:, None].expand(-1, seen.shape[1], -1))
    return places, visible & real[:, None]


def _tiles(
    part: RingPart,
    ranges: RingRanges,
    out: OutputWriter,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
) -> None:
    """Queries in tiles, several to a call."""
    batch, heads = q.shape[:2]
    together = _TOGETHER if batch == 1 else 1
    bias = _Bias(part, ranges, q.dtype)
    for low, high in _runs(ranges.widths, together):
        run = slice(low, high)
        keys, places = ranges.range_of(run, whole_vectors(max(1, ranges.widths[high - 1])))
        columns = bias.columns(keys, places)
        for first in range(low, high, together):
            tiles = slice(first, min(first + together, high))
            own = slice(tiles.start - low, tiles.stop - low)
            width = whole_vectors(max(1, ranges.widths[tiles.stop - 1]))
            range_keys = keys[:, own, :width]
            queries = ranges.queries[:, tiles] - start
            result, lse = out.attend(
                _tiles_of(q, queries, heads),
                _tiles_of(k, range_keys, heads),
                _tiles_of(v, range_keys, heads),
                bias.of(tiles, range_keys, columns[:, own, ..., :width]),
            )
            by_row = result.transpose(1, 2).reshape(batch, -1, heads, result.shape[3])
            by_row = by_row.transpose(1, 2)
            if lse is not None:
                lse = lse.transpose(1, 2).reshape(batch, -1, heads).transpose(1, 2)
            out.scatter((by_row, lse), queries.flatten(1))


def _runs(widths: list[int], together: int) -> Iterator[tuple[int, int]]:
    """Tiles ``low .. high - 1`` whose ranges are looked up at once, in whole calls."""
    low = 0
    while low < len(widths):
        high = min(low + together, len(widths))
        while high < len(widths):
            more = min(high + together, len(widths))
            if (more - low) * widths[more - 1] > _LOOKED_UP:
                break
            high = more
        yield low, high
        low = high


def _tiles_of(x: Tensor, places: Tensor, heads: int) -> Tensor:
    """Rows of x at ``places [draws, tiles, m]``: ``[batch * tiles, heads, m, head_dim]``."""
    rows = take_rows(x, places.flatten(1), heads).unflatten(2, places.shape[1:])
    return rows.transpose(1, 2).flatten(0, 1)


class _Bias:
    """What is added to the scores of tiles: 0 where a key is visible, at most -_HIDDEN else.

    Differences of places and of positions are clamped, not compared: on CPUs comparisons that
    yield booleans cost several times as much as this arithmetic.
    """

    def __init__(self, part: RingPart, ranges: RingRanges, dtype: torch.dtype):
        self._unless, self._dtype = part.unless, dtype
        self._queries, self._turn = ranges.queries, ranges.turn * _HIDDEN
        self._wide = ranges.wide
        # All [tiles, draws, tile, 1].
        self._places, self._reach, self._latest = (
            (x.float() * _HIDDEN).transpose(0, 1)[..., None]
            for x in (
                ranges.query_places,
                part.ring.reach[ranges.queries],
                part.latest[ranges.queries],
            )
        )

    def columns(self, keys: Tensor, places: Tensor) -> Tensor:
        """Places and positions, both ``[draws, tiles, width]``: ``[2, tiles, draws, 1, width]``."""
        both = torch.stack([places, keys]).transpose(1, 2)[:, :, :, None]
        return both.float() * _HIDDEN

    def of(self, tiles: slice, keys: Tensor, columns: Tensor) -> Tensor:
        """``[tiles, draws or heads, tile, width]``, for ``keys [draws, tiles, width]``."""
        key_places, positions = columns
        distance = (key_places - self._places[tiles]).abs_()
        if any(self._wide[tiles]):
            distance = torch.minimum(distance, (self._turn - distance).abs_(), out=distance)
        room = torch.sub(self._reach[tiles], distance, out=distance)
        room = torch.minimum(room, self._latest[tiles] - positions, out=room)
        if self._unless is not None:
            i = self._queries[:, tiles, :, None]
            hidden = self._unless(i, keys[:, :, None].long())
            # Other rings may tell heads apart that share this one.
            room = room.masked_fill(hidden.transpose(0, 1), -_HIDDEN)
        return room.clamp_(min=hidden_score(self._dtype), max=0).to(self._dtype)
