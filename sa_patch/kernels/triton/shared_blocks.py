"""Triton kernel of blocks that a tile of queries shares, and of its local window.

A tile's keys are gathered once for all of its rows, and multiplied as matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.exclusion import shown_by_other_part
from sa_patch.kernels.triton.softmax import (
    load_rows,
    query_tile,
    softmax_step,
    start_softmax,
    store_result,
)


@triton.jit(
    do_not_specialize=[
        "query_len",
        "block_size",
        "origin",
        "sinks",
        "tiles",
        "width",
        "padded_len",
    ]
)
def shared_blocks_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    table: tl.tensor,
    lows: tl.tensor,
    blocks: tl.tensor,
    first_row: tl.tensor,
    counts: tl.tensor,
    query_len: tl.tensor,
    block_size: tl.tensor,
    origin: tl.tensor,
    sinks: tl.tensor,
    tiles: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    out_batch: tl.tensor,
    out_head: tl.tensor,
    out_row: tl.tensor,
    rings: tl.tensor,
    sizes: tl.tensor,
    padded_len: tl.tensor,
    starts: tl.tensor,
    extents: tl.tensor,
    HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    SHARED: tl.constexpr,
    SLOTS: tl.constexpr,
    CHOOSERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOCAL: tl.constexpr,
    LIMITED: tl.constexpr,
    RINGS: tl.constexpr,
    DRAWS: tl.constexpr,
    SPANS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOIN: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """SLOTS queries of a tile of SHARED, of PACK query heads: the blocks that the tile chose.

    Where LOCAL, the local window as well; where LIMITED, its keys are left out of the blocks, and
    those that `shown_by_other_part` tells.

    Args:
        q, k, v, out: by strides of batch, head and row; lse fp32 ``[batch, HEADS, query_len]``.
        table: of `query_tile`, of tiles of SLOTS queries, a divisor of SHARED.
        lows, sinks: of `local_window_kernel`.
        blocks, first_row: int32 ``[batch, CHOOSERS, tiles, width]``: the blocks of each tile, and
            the first of its queries that sees them.
        counts: int32 ``[batch, CHOOSERS, tiles]``, blocks that there are.
        origin: the token that block 0 begins with.
        scale: at least 0, with log2(e) in it.
        cap: of `softmax_step`.
        rings ... SPANS: of `shown_by_other_part`; read where LIMITED.
    """
    batch, head, members, rows, positions, real, first, last = query_tile(
        table, HEADS, query_len, PACK, BLOCK_M
    )
    slot = tl.arange(0, BLOCK_M) // PACK
    real = real & (slot < SLOTS)
    last = tl.minimum(last, first + SLOTS - 1)
    entry = table + tl.program_id(0) // (HEADS // PACK) * 5
    tile = tl.load(entry + 1) // SHARED
    row_of_tile = tl.load(entry + 1) % SHARED + slot
    listed = (batch * CHOOSERS + head * CHOOSERS // HEADS) * tiles + tile
    places = (batch * HEADS + members) * query_len + rows
    q_tile = load_rows(q + batch * q_batch, members * q_head + rows * q_row, HEAD_DIM, BLOCK_D)
    k_base = k + batch * k_batch + (head // KV_GROUP).to(tl.int64) * k_head
    v_base = v + batch * v_batch + (head // KV_GROUP).to(tl.int64) * v_head
    low = tl.where(real, tl.load(lows + positions), 0)
    columns = tl.arange(0, BLOCK_N)
    acc, top, total = start_softmax(BLOCK_M, BLOCK_D)
    if LOCAL:
        for begin in range(0, tl.minimum(sinks, last + 1), BLOCK_N):
            keys = begin + columns
            visible = (keys < sinks)[None, :] & (keys[None, :] <= positions[:, None])
            at = tl.minimum(keys, last).to(tl.int64)
            k_tile = load_rows(k_base, at * k_row, HEAD_DIM, BLOCK_D)
            v_tile = load_rows(v_base, at * v_row, HEAD_DIM, BLOCK_D)
            acc, top, total = softmax_step(
                acc, top, total, q_tile, k_tile, v_tile, visible, scale, cap, True, CAPPED, WIDEN
            )
        for begin in range(tl.maximum(tl.load(lows + first), sinks), last + 1, BLOCK_N):
            keys = begin + columns
            visible = (keys[None, :] >= low[:, None]) & (keys[None, :] <= positions[:, None])
            at = tl.minimum(keys, last).to(tl.int64)
            k_tile = load_rows(k_base, at * k_row, HEAD_DIM, BLOCK_D)
            v_tile = load_rows(v_base, at * v_row, HEAD_DIM, BLOCK_D)
            acc, top, total = softmax_step(
                acc, top, total, q_tile, k_tile, v_tile, visible, scale, cap, True, CAPPED, WIDEN
            )
    keys_chosen = tl.load(counts + listed) * block_size
    for begin in range(0, keys_chosen, BLOCK_N):
        number = begin + columns
        inside = number < keys_chosen
        place = listed * width + tl.where(inside, number // block_size, 0)
        keys = tl.load(blocks + place) * block_size + origin + number % block_size
        keys = tl.where(inside, keys, 0)
        seen_from = tl.where(inside, tl.load(first_row + place), SHARED)
        visible = seen_from[None, :] <= row_of_tile[:, None]
        visible = visible & inside[None, :]
        if LIMITED:
            visible = visible & (keys >= sinks)[None, :] & (keys[None, :] < low[:, None])
            if RINGS + SPANS:
                shown = shown_by_other_part(
                    keys[None, :],
                    positions,
                    members,
                    places,
                    tl.load(entry + 4),
                    rings,
                    sizes,
                    padded_len,
                    starts,
                    extents,
                    BLOCK_M,
                    BLOCK_N,
                    RINGS,
                    DRAWS,
                    SPANS,
                )
                visible = visible & (shown == 0)
        at = keys.to(tl.int64)
        k_tile = load_rows(k_base, at * k_row, HEAD_DIM, BLOCK_D)
        v_tile = load_rows(v_base, at * v_row, HEAD_DIM, BLOCK_D)
        acc, top, total = softmax_step(
            acc, top, total, q_tile, k_tile, v_tile, visible, scale, cap, True, CAPPED, WIDEN
        )
    store_result(
        out + batch * out_batch,
        lse,
        members * out_head + rows * out_row,
        places,
        (acc, top, total),
        scale,
        real,
        HEAD_DIM,
        BLOCK_D,
        WITH_LSE,
        JOIN,
        WIDEN,
    )
