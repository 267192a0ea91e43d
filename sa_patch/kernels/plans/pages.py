"""Paged plans: the blocks that a tile of queries shares, as the page table of a sequence.

A tile's rows are the queries of all query heads of a KV head, and nothing else. So the keys that it
reads are exactly those of its blocks, of its neighbourhood and of the sinks, where lists of whole
key blocks would name most of the sequence. A page holds as many keys as a block and may begin with
any key: pages are views of the keys where they lie, and overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.kernels.local_window import LocalWindow
from sa_patch.kernels.plans.plan import Pass
from sa_patch.patterns import BlockTopK
from sa_patch.patterns.block_selection.shared_choice import tile_choices

Index = Any
"""Integers of torch or of CuTe."""

# An entry of a page table is two numbers: where its page begins, counted from the tile's first
# query, with the first and the last place in it that counts, and the first query of the tile that
# sees it, `_NEAR` where each query sees what lies in its own neighbourhood.
_PLACES = 64
LARGEST_PAGE = _PLACES - 1
LONGEST = 1 << 19
_NEAR = -1
# More than there are queries in a tile.
_NEVER = 1 << 20
# Rows of the last tile beyond the last query read behind their table.
_BEYOND = 512


class PagedPlan(NamedTuple):
    """How a pass is computed by tiles; a sequence is a tile of a KV head of a row of the batch."""

    starts: Tensor
    """int32 ``[batch, kv_heads, tiles, width]``: the first key of each page"""
    used: Tensor
    """int32 ``[batch, kv_heads, tiles]``: keys in the pages that are read, in whole steps"""
    tables: Tensor
    """int32 ``[numbers]``: what the mask reads"""
    numbers: tuple[int, ...]
    """of `paged_mask`"""
    page: int
    shared: int
    """queries of a tile"""


def paged_part(given: Pass, queries: int, keys: int) -> BlockTopK | None:
    """The part of a pass that its tiles can share pages of; None where lists have to do.

    Args:
        queries, keys: of the sequence, with the last keys' queries.
    """
    if given.rings or given.without or len(given.choices) != 1:
        return None
    part = given.choices[0]
    if not isinstance(part, BlockTopK) or part.shared == 1 or not part.topk:
        return None
    begins_tile = (keys - queries) % part.shared == 0
    fits = part.block_size <= min(LARGEST_PAGE, keys) and keys <= LONGEST
    return part if begins_tile and fits else None


def paged_plan(
    local: LocalWindow, part: BlockTopK, q: Tensor, k: Tensor, *, step: int
) -> PagedPlan:
    """The pages of every tile, made without waiting for the device.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``; the first query begins a tile.
        k: ``[batch, kv_heads, n, head_dim]``.
        step: keys that the kernel takes at once; it is never given a part of them, since what is
            not loaded may hold anything.
    """
    (batch, kv_heads, seq_len), device = k.shape[:3], q.device
    page, shared, start = part.block_size, part.shared, seq_len - q.shape[2]
    own = part.own_choices(q.flatten(0, 1), k.flatten(0, 1), range(start, seq_len))
    blocks, first_row, counts = tile_choices(own, shared)
    tiles = blocks.shape[1]
    # No more blocks lie before the last query's neighbourhood.
    most = part.eligible_at(seq_len - 1)
    blocks, first_row = blocks[..., :most], first_row[..., :most]
    rows = torch.arange(start, start + tiles * shared, device=device)
    # No later than behind the query itself, so that what lies before it is no later either.
    near = torch.minimum(local.first(rows).clamp(min=local.sinks), rows + 1)
    tile_first = rows[::shared, None]
    sink_keys = torch.arange(0, local.sinks, page, device=device).expand(tiles, -1)
    near_keys = torch.arange(0, local.reach + shared, page, device=device) + near[::shared, None]
    chosen_keys = blocks * page + part.sinks
    # Of every entry the first query that sees it, its first key and the one behind its last.
    entries = (
        (torch.zeros_like(sink_keys), sink_keys, (sink_keys + page).clamp(max=local.sinks)),
        (torch.full_like(near_keys, _NEAR), near_keys, near_keys + page),
        (
            first_row,
            chosen_keys.clamp(min=local.sinks),
            (chosen_keys + page).masked_fill(blocks < 0, 0),
        ),
    )
    # Whole steps of entries, so that every one which is read is there.
    room = -sum(keys.shape[-1] for _, keys, _ in entries) % (math.lcm(page, step) // page)
    codes, begins, ends = (
        pad(torch.cat([x.expand(len(blocks), -1, -1) for x in each], dim=2), (0, room))
        for each in zip(*entries, strict=True)
    )
    # A page ends with the last key at the latest, and may begin before what counts of it.
    starts = begins.clamp(max=seq_len - page)
    low = (begins - starts).clamp(max=LARGEST_PAGE)
    high = (ends.clamp(max=seq_len) - starts).clamp(min=0, max=page)
    packed = ((starts - tile_first) * _PLACES + low) * _PLACES + high
    used = (counts + (sink_keys.shape[1] + near_keys.shape[1])) * page
    used = (used + (step - 1)) // step * step
    tables = packed, codes, near.view(tiles, shared) - tile_first
    behind = torch.zeros(_BEYOND, dtype=torch.int32, device=device)
    return PagedPlan(
        starts.int().view(batch, kv_heads, tiles, -1),
        used.int().view(batch, kv_heads, tiles),
        torch.cat([*(x.flatten().int() for x in tables), behind]),
        (tiles, starts.shape[2], starts.numel()),
        page,
        shared,
    )


def paged_mask(
    page: int,
    shared: int,
    number: Callable[[int], Index],
    load: Callable[[Index], Index],
    integer: Callable[[Index], Index],
    sequence: Index,
    slot: Index,
    place: Index,
) -> Index:
    """Whether a query of a tile sees a key among its pages, in what torch and CuTe share.

    Args:
        page, shared: of the plan; they are compiled in.
        number: one of the plan's numbers.
        load: reads its tables.
        integer: makes 0 and 1 of a truth value.
        sequence, slot, place: of the tile, of its query, and of the key in its pages.
    """
    tiles, width, end = (number(n) for n in range(3))
    entry = sequence * width + place // page
    packed, code = load(entry), load(end + entry)
    # All of this hangs on the key alone. Positions are counted from the tile's first query.
    offset = place % page
    key = (packed >> 12) + offset
    counts = (offset >= ((packed >> 6) & LARGEST_PAGE)) & (offset < (packed & LARGEST_PAGE))
    near = integer(code < 0)
    seen_from = code + near * (key - _NEAR) + _NEVER * (1 - integer(counts))
    # Behind the first key of its neighbourhood a query sees what is near, before it what was
    # chosen, and the sinks.
    behind = integer(key >= load(end + end + (sequence % tiles) * shared + slot))
    return (seen_from <= slot) & (behind == near)
