"""Launches of the Triton kernel of blocks that tiles of queries share."""

from __future__ import annotations

import torch

from sa_patch.kernels.tiling import queries_at_once
from sa_patch.kernels.triton import launch_table
from sa_patch.kernels.triton.block_choice.launch import own_choices
from sa_patch.kernels.triton.launch import Call, ExcludedKeys, shape
from sa_patch.kernels.triton.launch_table import Launch, shared_launch
from sa_patch.kernels.triton.parts import LocalWindow
from sa_patch.kernels.triton.shared_blocks import shared_blocks_kernel
from sa_patch.kernels.triton.softmax import INTERPRETED
from sa_patch.patterns import BlockTopK
from sa_patch.patterns.block_selection.shared_choice import tile_choices

# Choices of queries held at once, where they grow with the position; queries go in turns beyond.
CHOICES = 1 << 26
# Queries of a tile beyond which registers would not hold their results.
_MOST_SLOTS = 128


def launch_shared(
    call: Call,
    pattern: BlockTopK,
    local_window: LocalWindow,
    shown: ExcludedKeys,
    choose: Launch,
    *,
    local: bool,
    limited: bool,
) -> None:
    """Blocks of a pattern whose tiles of queries share their choices.

    Args:
        local_window: of the whole pattern.
        shown: keys to leave out of the blocks where they are `limited`.
        choose: of the choice.
        local: attend to the local window as well.
        limited: leave its keys out of the blocks, where a chosen block may have any of them.
    """
    choosers = call.k.shape[1] if pattern.grouped else call.q.shape[1]
    of_a_query = len(call.q) * choosers * pattern.most_picks(call.k.shape[2])
    step = queries_at_once(of_a_query, CHOICES, pattern.shared)
    if step >= call.query_len:
        _launch_tiles(call, pattern, local_window, shown, choose, local, limited)
        return
    for first in range(0, call.most_queries, step):
        own = slice(first, first + step)
        part = call.of_queries(own)
        rest = local_window, shown.of_queries(own), choose, local, limited
        _launch_tiles(part, pattern, *rest)
        if call.lse is not None and part.lse is not None:
            call.lse[:, :, own] = part.lse


def _launch_tiles(
    call: Call,
    pattern: BlockTopK,
    local_window: LocalWindow,
    shown: ExcludedKeys,
    choose: Launch,
    local: bool,
    limited: bool,
) -> None:
    """`launch_shared` for queries whose choices are held at once."""
    own = own_choices(call, pattern, choose)
    choices = tile_choices(own.flatten(0, 1), pattern.shared)
    blocks, first_row, counts = (x.to(torch.int32).unflatten(0, own.shape[:2]) for x in choices)
    part = launch_table.device_class(call.q.device, interpreted=INTERPRETED)
    together = call.group if pattern.grouped else 1
    slots = max(n for n in range(1, _MOST_SLOTS + 1) if pattern.shared % n == 0)
    compared = (shown.rings is not None) + (shown.starts is not None)
    launch, pack = shared_launch(call.q, slots, together, part, compared=compared)
    table = call.table(slots)
    if not len(table):
        return
    shared_blocks_kernel[(len(table) * (call.q.shape[1] // pack),)](
        call.q,
        call.k,
        call.v,
        call.out,
        call.lse,
        table,
        call.lows(local_window),
        blocks,
        first_row,
        counts,
        call.query_len,
        pattern.block_size,
        pattern.sinks,
        local_window.sinks,
        blocks.shape[2],
        blocks.shape[3],
        *call.scores,
        *call.strides(),
        PACK=pack,
        SHARED=pattern.shared,
        SLOTS=slots,
        CHOOSERS=blocks.shape[1],
        LOCAL=local,
        LIMITED=limited,
        CAPPED=call.softcap is not None,
        WIDEN=INTERPRETED,
        **shown.arguments(),
        **call.results(),
        **shape(call.q, call.k, launch),
    )
