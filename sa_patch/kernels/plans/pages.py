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

from sa_patch.kernels.local_window import LocalWindow
from sa_patch.kernels.plans.plan import Pass
from sa_patch.patterns import BlockTopK
from sa_patch.patterns.block_selection.shared_choice import tile_choices

Index = Any
"""Integers of torch or of CuTe."""

# What an entry of a page table shows, and by which keys: sinks, those of each query's
# neighbourhood, or those between, from the query on that chose them. An absent one shows nothing.
_SINKS, _NEAR, _CHOSEN, _ABSENT = range(4)
_KINDS = 4
# Larger than any page.
_SKIPS = 64
LARGEST_PAGE = _SKIPS - 1
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
    return part if begins_tile and part.block_size <= min(LARGEST_PAGE, keys) else None


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
    tiles, sequences = blocks.shape[1], (batch, kv_heads, blocks.shape[1])
    # No more blocks lie before the last query's neighbourhood.
    most = part.eligible_at(seq_len - 1)
    blocks, first_row = blocks[..., :most], first_row[..., :most]
    chosen = blocks * page + part.sinks, first_row * _KINDS + _CHOSEN, blocks >= 0
    rows = torch.arange(start, start + tiles * shared, device=device)
    near = local.first(rows).clamp(min=local.sinks)
    sink_keys = torch.arange(0, local.sinks, page, device=device).expand(tiles, -1)
    near_keys = torch.arange(0, local.reach + shared, page, device=device)
    near_keys = near[::shared, None] + near_keys
    ends = rows[shared - 1 :: shared, None].clamp(max=seq_len - 1)
    fixed = [
        (keys, torch.full_like(keys, kind), keys <= ends)
        for keys, kind in ((sink_keys, _SINKS), (near_keys, _NEAR))
    ]
    every = [
        torch.cat([*(x.expand(len(blocks), -1, -1) for x in alike), own_entries], dim=2)
        for *alike, own_entries in zip(*fixed, chosen, strict=True)
    ]
    # Whole steps of entries, so that every one which is read is there.
    room = -every[0].shape[2] % (math.lcm(page, step) // page)
    begins, codes, there = (torch.nn.functional.pad(x, (0, room)) for x in every)
    begins, codes = begins.where(there, 0), codes.where(there, _ABSENT)
    # A page ends with the last key at the latest; what it holds of the one before is skipped.
    starts = begins.clamp(max=seq_len - page)
    used = (counts + (sink_keys.shape[1] + near_keys.shape[1])) * page
    used = (used + (step - 1)) // step * step
    tables = [starts * _SKIPS + (begins - starts), codes, near]
    behind = torch.zeros(_BEYOND, dtype=torch.int32, device=device)
    return PagedPlan(
        starts.int().view(*sequences, -1),
        used.int().view(sequences),
        torch.cat([*(x.flatten().int() for x in tables), behind]),
        (tiles, starts.shape[2], starts.numel(), start, local.sinks),
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
    tiles, width, end, start, sinks = (number(n) for n in range(5))
    entry = sequence * width + place // page
    begin, code = load(entry), load(end + entry)
    skipped, offset = begin % _SKIPS, place % page
    key = begin // _SKIPS + offset
    row = (sequence % tiles) * shared + slot
    # 0, 1 and 2 as the kinds of entries: behind the sinks, and before the neighbourhood.
    before = integer(key < load(end + end + row))
    zone = (1 + before) * integer(key >= sinks)
    seen = (key <= start + row) & (offset >= skipped)
    return seen & (zone == code % _KINDS) & (slot >= code // _KINDS)
