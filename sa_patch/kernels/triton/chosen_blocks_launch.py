"""Launches of the Triton kernels of blocks chosen by content: sort choices, attend to them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sa_patch.kernels.triton.block_choice.launch import choose, origin_of
from sa_patch.kernels.triton.chosen_blocks import chosen_kernel
from sa_patch.kernels.triton.launch import (
    Call,
    Choices,
    ExcludedKeys,
    launch_local_window,
    shape,
    strides,
)
from sa_patch.kernels.triton.launch_table import (
    Launch,
    MobaConfig,
    SmallBlocksConfig,
    packed_heads,
)
from sa_patch.kernels.triton.parts import LocalWindow
from sa_patch.kernels.triton.small_blocks import small_blocks_kernel
from sa_patch.kernels.triton.softmax import INTERPRETED
from sa_patch.kernels.triton.tiles import row_table
from sa_patch.patterns import BlockTopK, MoBA

# Partial results held at once; KV heads are served in turns beyond, and then queries.
PARTIAL_BYTES = 1 << 30
# Queries that go together at least: enough to fill tiles that chose a block.
_QUERIES = 256
# First key of a block that is not there: beyond every position, whatever is added to it.
_NO_KEY = 1 << 30


def first_keys(pattern: MoBA | BlockTopK, picks: Tensor) -> Tensor:
    """First key of each pick: int32, like `picks`, beyond every position where there is none."""
    keys = picks * pattern.block_size + origin_of(pattern)
    return keys.masked_fill_(picks < 0, _NO_KEY)


@lru_cache(maxsize=64)
def _numbers(
    batch: int,
    kv_heads: int,
    heads: int,
    blocks: int,
    tiles: int,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers that hang on shapes alone; filled on a stream.

    Returns:
        of each batch row and query head, int32 ``[batch * heads]``, the group of its block 0, which
        comes after that of choices that lack a block; and all groups and one more, int32, and all
        tiles, int64.
    """
    problem = torch.arange(batch * heads, dtype=torch.int32, device=device)
    groups = batch * kv_heads * (blocks + 1)
    return (
        problem // (heads // kv_heads) * (blocks + 1) + 1,
        torch.arange(groups + 1, dtype=torch.int32, device=device),
        torch.arange(tiles, device=device),
    )


def attend_choices(
    call: Call,
    pattern: MoBA | BlockTopK,
    picks: Tensor,
    local_window: LocalWindow | None,
    shown: ExcludedKeys,
    launch: Launch,
) -> Choices:
    """Attention of every query over each of its picks alone.

    Args:
        picks: of `choose`, at least one to a query.
        local_window: keys to leave out; None where no chosen block has any of them.
        shown: keys to leave out as well.
    """
    q, k = call.q, call.k
    (batch, heads, queries, _), (_, choosers, _, count) = q.shape, picks.shape
    blocks = max(0, k.shape[2] - origin_of(pattern)) // pattern.block_size
    groups, size = batch * k.shape[1] * (blocks + 1), launch.block_m
    choices = batch * heads * queries * count
    # Each group fills whole tiles and at most one in part: no need to ask the device how many.
    tiles = choices // size + min(groups, choices)
    first_block, group_numbers, tile_numbers = _numbers(
        batch, k.shape[1], heads, blocks, tiles, q.device, call.stream
    )
    # By query before head: a choice's place in its tile then hangs on no later query, and neither
    # does the rounding of its products.
    group = picks[:, :, None] + first_block.view(batch, choosers, -1, 1, 1)
    ordered, order = group.flatten(1, 2).transpose(1, 2).flatten().sort(stable=True)
    group_first = torch.searchsorted(ordered, group_numbers)
    tile_end = ((group_first.diff() + (size - 1)) // size).cumsum(0)
    tile_group = torch.searchsorted(tile_end, tile_numbers, right=True)
    order_shape = (batch, queries, heads, count)
    partial = torch.empty(*order_shape, q.shape[3], dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(order_shape, dtype=torch.float32, device=q.device)
    if tiles:
        chosen_kernel[(tiles,)](
            q,
            k,
            call.v,
            partial,
            partial_lse,
            order,
            group_first,
            tile_end,
            tile_group,
            row_table(call.rows, batch, q.device, call.stream),
            None if local_window is None else call.lows(local_window),
            groups,
            queries,
            origin_of(pattern),
            pattern.block_size,
            blocks,
            count,
            0 if local_window is None else local_window.sinks,
            *call.scores,
            *strides(q, k, call.v),
            EVEN=pattern.block_size % launch.block_n == 0,
            LIMITED=local_window is not None,
            CAPPED=call.softcap is not None,
            WIDEN=INTERPRETED,
            **shown.arguments(),
            **shape(q, k, launch),
        )
    return Choices(picks, partial, partial_lse)


def launch_sorted(
    call: Call,
    pattern: MoBA | BlockTopK,
    picks: Tensor | None,
    local_window: LocalWindow,
    hidden: LocalWindow | None,
    shown: ExcludedKeys,
    config: MobaConfig,
) -> None:
    """Chosen blocks by sorting, and the local window in the same launch.

    Args:
        picks: of `choose`; made here where they are not given.
        local_window: keys to attend to beside the blocks.
        hidden, shown: keys to leave out of the blocks, as `attend_choices` takes them.
    """
    batch, _, queries, head_dim = call.q.shape
    kv_heads, group = call.k.shape[1], call.group
    count = _picked(pattern, call) if picks is None else picks.shape[3]
    of_a_query = batch * group * count * head_dim * 4
    at_once = max(_QUERIES, PARTIAL_BYTES // max(1, of_a_query))
    if at_once < queries:
        for low in range(0, call.most_queries, at_once):
            own = slice(low, low + at_once)
            part = call.of_queries(own)
            found = None if picks is None else picks[:, :, own]
            rest = local_window, hidden, shown.of_queries(own), config
            launch_sorted(part, pattern, found, *rest)
            if call.lse is not None and part.lse is not None:
                call.lse[:, :, own] = part.lse
        return
    step = max(1, PARTIAL_BYTES // max(1, of_a_query * queries))
    for first in range(0, kv_heads, step):
        kv, own = slice(first, first + step), slice(first * group, (first + step) * group)
        part = call._replace(
            q=call.q[:, own],
            k=call.k[:, kv],
            v=call.v[:, kv],
            out=call.out[:, own],
            lse=None if call.lse is None else call.lse[:, own].contiguous(),
        )
        if picks is None:
            found = choose(part, pattern, config.choose)
        else:
            choosers = picks.shape[1] // kv_heads
            found = picks[:, first * choosers : (first + step) * choosers]
        choices = None
        if found.shape[3]:
            choices = attend_choices(
                part, pattern, found.contiguous(), hidden, shown.of_heads(own), config.chosen
            )
        launch_local_window(part, local_window, config.own, choices)
        if call.lse is not None and part.lse is not None:
            call.lse[:, own] = part.lse


def _picked(pattern: MoBA | BlockTopK, call: Call) -> int:
    if isinstance(pattern, MoBA):
        return pattern.topk - 1
    return pattern.most_picks(call.k.shape[2])


def launch_gathered(
    call: Call,
    pattern: MoBA | BlockTopK,
    picks: Tensor,
    hidden: LocalWindow,
    shown: ExcludedKeys,
    config: SmallBlocksConfig,
) -> None:
    """Chosen blocks alone, each query gathering its own; arguments as of `launch_sorted`."""
    launch = config.launch
    # Heads gain by sharing a tile where they share the keys; then all that fit may fill it.
    shared = isinstance(pattern, BlockTopK) and pattern.grouped
    pack = packed_heads(call.group, 4 * launch.block_m) if shared else 1
    table = call.table(launch.block_m // pack)
    if not len(table) or not picks.shape[3]:
        return
    small_blocks_kernel[(len(table) * (call.q.shape[1] // pack),)](
        call.q,
        call.k,
        call.v,
        call.out,
        call.lse,
        table,
        call.lows(hidden),
        picks.contiguous(),
        call.query_len,
        pattern.block_size,
        origin_of(pattern),
        picks.shape[3],
        hidden.sinks,
        *call.scores,
        *call.strides(),
        PACK=pack,
        CHOOSERS=picks.shape[1],
        CAPPED=call.softcap is not None,
        WIDEN=INTERPRETED,
        **shown.arguments(),
        **call.results(),
        **shape(call.q, call.k, launch),
    )
