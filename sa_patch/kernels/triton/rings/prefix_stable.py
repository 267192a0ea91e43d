"""Blocks of prefix-stable stochastic attention: queries that are neighbours on the ring, and the
band of keys around each block.

Reaches shrink as positions grow, and later keys are of no use to early queries: queries search in
segments, all of which are searched at once.
"""

from __future__ import annotations

from itertools import accumulate
from math import ceil, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.triton import tiles
from sa_patch.kernels.triton.launch_table import UNLIMITED
from sa_patch.kernels.triton.rings import draws
from sa_patch.kernels.triton.tiles import current_stream, on_device
from sa_patch.patterns import PSA
from sa_patch.patterns.prefix_stable import RING_SIZE


class Blocks(NamedTuple):
    """What `RingPlan` holds under these names, with draws as first dimension."""

    queries: Tensor
    query_steps: Tensor
    windows: Tensor
    keys: Tensor
    key_steps: Tensor


def segments(pattern: PSA, start: int, end: int, block: int) -> tuple[tuple[int, int], ...]:
    """Queries ``first .. last - 1`` that share a search among the keys below `last`, of those at
    ``start .. end - 1``: up to the next power of two, so that reaches differ by a factor of two.

    Segments that one block holds are one, and a few queries at the end join those before, since the
    band of a block of few queries is wide.
    """
    bounds = [max(start, pattern.window)]
    while bounds[-1] < end:
        bits = max(bounds[-1].bit_length(), (bounds[-1] + block).bit_length() - 1)
        bounds.append(min(end, 1 << bits))
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < bounds[-2] // 4:
        del bounds[-2]
    return tuple(zip(bounds, bounds[1:], strict=False))


# A band that is wider than its bound occurs once in e^40 blocks at most.
_RARE = 40


def band_width(pattern: PSA, start: int, end: int, block: int) -> int:
    """Keys that hold every band, so that nobody has to ask the device how wide the widest is.

    Points are uniform, so that a block's queries span ``spread`` of the ring at most but for one
    block in ``e^_RARE`` (Chernoff), and so few keys fall on so much of it (Bernstein).
    """
    widest = 0
    for first, last in segments(pattern, start, end, block):
        queries = last - first
        fewest = min(block, queries)
        spread = (fewest + _RARE + sqrt(_RARE**2 + 2 * fewest * _RARE)) / queries
        reach = (pattern.window - 1) / first
        # All of the ring holds all keys, not some by chance; more of it holds some of them twice.
        certain, chance = (first, 0.0) if spread >= 1 else (0, first * spread)
        chance += last * reach
        bound = fewest + certain + ceil(chance + sqrt(2 * chance * _RARE) + _RARE)
        widest = max(widest, min(bound, 2 * last))
    return widest


class _Search(NamedTuple):
    """Which queries search among which keys, in all segments of a span at once.

    Each segment has a stretch of its own of one long line, with its keys once around the ring to
    either side, so that a band never has a seam. Blocks of queries stand one after the other.
    """

    keys: Tensor
    """int64, positions of the keys of every segment"""
    stretch_of_keys: Tensor
    """int64, like `keys`: where the segment's stretch begins"""
    around: Tensor
    """int64, three times as long: which key, in the order of the ring, stands where on the line"""
    turns: Tensor
    """int64, like `around`: what is added to its point there"""
    stretch_of_queries: Tensor
    """int64, of the positions from the first query on"""
    rows: Tensor
    """int64 ``[blocks * block]``, which query, in the order of the ring, stands in every row; the
    segment's last in those to spare"""
    spare: Tensor
    """bool, like `rows`"""
    stretch_of_rows: Tensor
    """int64, like `rows`"""


# Of the line; the keys of a segment take three rings of it.
_STRETCH = 4 * RING_SIZE


def _search(parts: tuple[tuple[int, int], ...], block: int, device: torch.device) -> _Search:
    """Made on the device, from a few numbers of every segment."""
    lasts = [last for _, last in parts]
    counts = [last - first for first, last in parts]
    padded = [-(-count // block) * block for count in counts]

    def in_segments(sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Of entries that stand segment after segment: the segment, and the place in it."""
        ends = list(accumulate(sizes, initial=0))
        bounds = on_device(torch.tensor(ends), device)
        entries = torch.arange(ends[-1], device=device)
        segment = torch.searchsorted(bounds[1:], entries, right=True)
        return segment, entries - bounds[segment]

    def first_of(sizes: list[int]) -> Tensor:
        return on_device(torch.tensor(list(accumulate(sizes, initial=0))), device)

    of_key, keys = in_segments(lasts)
    of_place, place = in_segments([3 * last for last in lasts])
    of_query, _ = in_segments(counts)
    of_row, row = in_segments(padded)
    last = on_device(torch.tensor(lasts), device)[of_place]
    count = on_device(torch.tensor(counts), device)[of_row]
    return _Search(
        keys=keys,
        stretch_of_keys=of_key * _STRETCH,
        around=place % last + first_of(lasts)[of_place],
        turns=(place // last - 1) * RING_SIZE,
        stretch_of_queries=of_query * _STRETCH,
        rows=torch.minimum(row, count - 1) + first_of(counts)[of_row],
        spare=row >= count,
        stretch_of_rows=of_row * _STRETCH,
    )


def blocks_of(
    pattern: PSA,
    start: int,
    end: int,
    *,
    layers: range,
    heads: int,
    block: int,
    device: torch.device,
) -> Blocks:
    """Blocks of the queries at ``start .. end - 1``, segment after segment."""
    points = draws.points(pattern, end, layers, heads, device).flatten(0, 1)
    parts = segments(pattern, start, end, block)
    if not parts:
        empty = torch.zeros(len(points), 0, block, dtype=torch.int32, device=device)
        return Blocks(empty, empty, empty, empty, empty)
    key = ("segments", parts, block, device, current_stream(device))
    search = _Search(*tiles.PLANS.get(key, lambda: _search(parts, block, device)))
    ordered, order = (points[:, search.keys] + search.stretch_of_keys).sort(dim=1, stable=True)
    line = ordered[:, search.around] + search.turns
    positions = search.keys[order][:, search.around]
    first = parts[0][0]
    queries = (points[:, first:] + search.stretch_of_queries).argsort(dim=1, stable=True) + first
    queries = queries[:, search.rows]
    shape = (-1, block)
    reaches = pattern.reach(end, device)[queries].unflatten(1, shape)
    begins = (points.gather(1, queries) + search.stretch_of_rows).unflatten(1, shape) - reaches
    low, high = begins.amin(-1), (begins + 2 * reaches).amax(-1)
    from_key = torch.searchsorted(line, low)
    key_count = torch.searchsorted(line, high, right=True) - from_key
    columns = torch.arange(band_width(pattern, start, end, block), device=device)
    torch._assert_async((key_count <= len(columns)).all(), "a band of PSA is wider than its bound")
    places = (from_key[..., None] + columns).clamp(max=line.shape[1] - 1).flatten(1)
    band = (*from_key.shape, len(columns))
    keys = positions.gather(1, places).view(band)
    key_steps = line.gather(1, places).view(band) - low[..., None]
    keys, key_order = keys.masked_fill_(columns >= key_count[..., None], UNLIMITED).sort(
        dim=-1, stable=True
    )
    # Rows to spare took part until the bands were known.
    queries, query_order = (
        queries.masked_fill_(search.spare, UNLIMITED).unflatten(1, shape).sort(dim=-1, stable=True)
    )
    return Blocks(
        queries.to(torch.int32),
        (begins - low[..., None]).gather(-1, query_order).to(torch.int32),
        (2 * reaches + 1).gather(-1, query_order).to(torch.int32),
        keys.to(torch.int32),
        key_steps.gather(-1, key_order).to(torch.int32),
    )
