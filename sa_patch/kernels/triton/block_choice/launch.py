"""Launches of the choice of blocks by content: of all eligible ones, or coarse to fine."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from sa_patch.kernels.triton import launch_table
from sa_patch.kernels.triton.block_choice.flat import choose_kernel
from sa_patch.kernels.triton.block_choice.many import choose_many_kernel
from sa_patch.kernels.triton.block_choice.tree import tree_search_kernel
from sa_patch.kernels.triton.launch import Call, shape, strides
from sa_patch.kernels.triton.launch_table import Launch, next_power_of_2, packed_heads
from sa_patch.kernels.triton.softmax import INTERPRETED
from sa_patch.patterns import BlockTopK, MoBA
from sa_patch.patterns.block_selection.block_means import block_means
from sa_patch.patterns.block_selection.tree import level_count, level_means

# Picks that one sweep of the flat choice holds in registers, and those for which sweeps are made.
_PICKS, _SWEPT = 4, 16
# Scores held at once where more are picked, or what grows with n: 256 MiB, or those of a tile.
SCORES = 1 << 26
# Candidates of a query on a level of a tree that a program holds in registers.
MOST_CANDIDATES = 1024


def origin_of(pattern: MoBA | BlockTopK) -> int:
    """The first token of block 0."""
    return pattern.sinks if isinstance(pattern, BlockTopK) else 0


def choose(call: Call, pattern: MoBA | BlockTopK, launch: Launch) -> Tensor:
    """The blocks that each query chooses, in any order.

    Args:
        launch: of the choice of mixture of block attention.

    Returns:
        int32 ``[batch, choosers, nq, count]``, -1 where fewer can be chosen and at padding; a
        chooser is a query head, or a KV head of a pattern whose query heads choose together.
    """
    if isinstance(pattern, MoBA):
        count = min(pattern.topk - 1, call.k.shape[2] // pattern.block_size)
        return _ranked(call, pattern, count, launch)
    return own_choices(call, pattern, launch)


def of_query_heads(picks: Tensor, heads: int) -> Tensor:
    """What `choose` gives, for each of the query heads."""
    times = heads // picks.shape[1]
    return picks if times == 1 else picks.repeat_interleave(times, 1)


def own_choices(call: Call, pattern: BlockTopK, launch: Launch) -> Tensor:
    """The blocks that each query chooses for itself: int32 ``[batch, choosers, nq, m]``."""
    if not pattern.branch and not pattern.threshold:
        return _ranked(call, pattern, pattern.most_picks(call.k.shape[2]), launch)
    if pattern.branch and _candidates(pattern) <= MOST_CANDIDATES:
        return _searched(call, pattern)
    q, k = call.q, call.k
    (picks,) = _no_picks(call, pattern)
    for row in call.rows:
        end = max(0, min(call.query_len, row.length - row.start))
        picks[row.batch, :, :end] = pattern.own_choices(
            q[row.batch, :, :end],
            k[row.batch, :, : row.length],
            range(row.start, row.start + end),
        )
    return picks


def _no_picks(call: Call, pattern: BlockTopK, *others: int) -> list[Tensor]:
    """int32 ``[batch, choosers, nq, topk]`` and, of the same memory, others as wide as named."""
    choosers = call.k.shape[1] if pattern.grouped else call.q.shape[1]
    shape, widths = (len(call.q), choosers, call.query_len), (pattern.topk, *others)
    rows = prod(shape)
    memory = torch.full((rows * sum(widths),), -1, dtype=torch.int32, device=call.q.device)
    parts = memory.split([rows * width for width in widths])
    return [part.view(*shape, width) for part, width in zip(parts, widths, strict=True)]


def _candidates(pattern: BlockTopK) -> int:
    """The most nodes that a query compares on a level: children of kept ones, and those without a
    parent."""
    return pattern.beam * pattern.branch + pattern.branch - 1


def _searched(call: Call, pattern: BlockTopK) -> Tensor:
    """Blocks chosen coarse to fine, in one launch beside those of the mean keys: as of
    `own_choices`."""
    q, k, branch, beam = call.q, call.k, pattern.branch, pattern.beam
    # Picks, and behind them what the search keeps on its way.
    picks, kept = _no_picks(call, pattern, beam)
    longest = min(k.shape[2], max(row.length for row in call.rows))
    most = pattern.eligible_at(longest - 1)
    if not most or not pattern.topk:
        return picks
    choosers = picks.shape[1]
    part = launch_table.device_class(q.device, interpreted=INTERPRETED)
    launch = launch_table.tree_launch(_candidates(pattern), longest, part)
    table = call.table(launch.block_m)
    if not len(table):
        return picks
    levels = level_count(most, branch, beam)
    by_level = level_means(k[:, :, pattern.sinks :], pattern.block_size, branch, levels)
    means = torch.cat(by_level[::-1], 2)
    arguments = {**shape(q, k, launch), "HEADS": choosers, "KV_GROUP": choosers // k.shape[1]}
    tree_search_kernel[(len(table) * choosers,)](
        q,
        means,
        kept,
        picks,
        table,
        _eligible(pattern, 1 << longest.bit_length(), q.device, call.stream),
        q.shape[2],
        by_level[0].shape[2],
        means.shape[2],
        levels,
        branch ** (levels - 1),
        pattern.topk,
        beam,
        branch,
        *strides(q),
        GROUP=q.shape[1] // choosers,
        **arguments,
    )
    return picks


def _ranked(call: Call, pattern: MoBA | BlockTopK, count: int, launch: Launch) -> Tensor:
    """The best of all eligible blocks: int32 ``[batch, choosers, nq, count]``."""
    q, k = call.q, call.k
    if isinstance(pattern, BlockTopK) and pattern.grouped:
        q = q.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32)
    picks = torch.full((*q.shape[:3], count), -1, dtype=torch.int32, device=q.device)
    means = block_means(k[:, :, origin_of(pattern) :], pattern.block_size).contiguous()
    pack = packed_heads(q.shape[1] // k.shape[1], launch.block_m)
    table = call.table(launch.block_m // pack)
    if not (len(table) and count and means.shape[2]):
        return picks
    longest = max(row.length for row in call.rows)
    eligible = _eligible(pattern, 1 << longest.bit_length(), q.device, call.stream)
    same = {"PACK": pack, **shape(q, k, launch)}
    if isinstance(pattern, BlockTopK) and (pattern.percent or count > _SWEPT):
        _launch_many(pattern, q, means, picks, table, eligible, same)
    else:
        choose_kernel[(len(table) * (q.shape[1] // pack),)](
            q,
            means,
            picks,
            table,
            eligible,
            q.shape[2],
            means.shape[2],
            count,
            *strides(q),
            PICKS=min(_PICKS, next_power_of_2(count)),
            **same,
        )
    return picks


def _launch_many(
    pattern: BlockTopK,
    q: Tensor,
    means: Tensor,
    picks: Tensor,
    table: Tensor,
    eligible: Tensor,
    same: dict[str, Any],
) -> None:
    """`choose_many_kernel` for as many tiles at a time as scores may be held of.

    Args:
        same: compile-time parameters of every kernel of a choice.
    """
    programs, blocks = q.shape[1] // same["PACK"], means.shape[2]
    # Rows of scores that begin where memory is read at once.
    width = -(-blocks // 16) * 16
    of_a_tile = programs * same["BLOCK_M"] * width
    # Tables that begin so as well: others would be compiled for anew.
    at_once = SCORES // of_a_tile
    at_once = at_once // 4 * 4 or max(1, at_once)
    scores = means.new_empty(min(at_once, len(table)) * of_a_tile, dtype=torch.int32)
    for first in range(0, len(table), at_once):
        part = table[first : first + at_once]
        choose_many_kernel[(len(part) * programs,)](
            q,
            means,
            scores,
            picks,
            part,
            eligible,
            q.shape[2],
            blocks,
            width,
            picks.shape[3],
            pattern.percent,
            pattern.topk,
            *strides(q),
            **same,
        )


@lru_cache(maxsize=64)
def _eligible(pattern: MoBA | BlockTopK, size: int, device: torch.device, stream: int) -> Tensor:
    """By position how many blocks a query may choose from: int32; filled on a stream."""
    positions = torch.arange(size, device=device)
    if isinstance(pattern, BlockTopK):
        return pattern.eligible(positions).to(torch.int32)
    return (positions // pattern.block_size).to(torch.int32)
