"""Triton kernel of large blocks chosen by content: attention to whole blocks.

Choices (`block_choice`) are sorted by block, so that `chosen_kernel` meets the keys of one block
with tiles of queries that chose it, whichever of its KV head's query heads they belong to. The
local window's kernel takes the partial results in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.exclusion import shown_by_other_part
from sa_patch.kernels.triton.softmax import (
    finish_softmax,
    load_rows,
    softmax_step,
    start_softmax,
    store_rows,
)


@triton.jit(
    do_not_specialize=[
        "groups",
        "query_len",
        "origin",
        "block_size",
        "blocks",
        "count",
        "sinks",
        "padded_len",
    ]
)
def chosen_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    order: tl.tensor,
    group_first: tl.tensor,
    tile_end: tl.tensor,
    tile_group: tl.tensor,
    about: tl.tensor,
    lows: tl.tensor,
    groups: tl.tensor,
    query_len: tl.tensor,
    origin: tl.tensor,
    block_size: tl.tensor,
    blocks: tl.tensor,
    count: tl.tensor,
    sinks: tl.tensor,
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
    rings: tl.tensor,
    sizes: tl.tensor,
    padded_len: tl.tensor,
    starts: tl.tensor,
    extents: tl.tensor,
    HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    LIMITED: tl.constexpr,
    RINGS: tl.constexpr,
    DRAWS: tl.constexpr,
    SPANS: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """A tile of choices of one block: their softmax over its keys alone.

    Args:
        partial, partial_lse: fp32 ``[choices, HEAD_DIM]`` and ``[choices]`` (base 2); choices are
            numbered by batch row, query, head and pick.
        order: int64 ``[choices]``: numbers of the choices, sorted by group.
        group_first: int64 ``[groups + 1]``, of sorted choices. A group is a batch row, KV head and
            block, or before its blocks the lack of one.
        tile_end: int64 ``[groups]``, the tile after the last of each group.
        tile_group: int64, the group of each tile, `groups` for tiles that do not exist.
        about, lows, sinks: of `row_table` and `local_window_kernel`; LIMITED leaves out the
            keys of the local window.
        origin: first token of block 0.
        rings ... SPANS: of `shown_by_other_part`; read where LIMITED.
    """
    tile = tl.program_id(0)
    group = tl.load(tile_group + tile)
    block = group % (blocks + 1) - 1
    if (group < groups) & (block >= 0):
        # Before a block there is always another group.
        earlier = tile - tl.load(tile_end + group - 1)
        begin = tl.load(group_first + group) + earlier * BLOCK_M
        number = begin + tl.arange(0, BLOCK_M)
        real = number < tl.load(group_first + group + 1)
        choice = tl.load(order + number, mask=real, other=0)
        head = choice // count % HEADS
        row = choice // count // HEADS % query_len
        batch = group // (blocks + 1) // (HEADS // KV_GROUP)
        kv_head = group // (blocks + 1) % (HEADS // KV_GROUP)
        # Rows that are no choice read choice 0, which may be another head's; they write nothing.
        q_tile = load_rows(q + batch * q_batch, head * q_head + row * q_row, HEAD_DIM, BLOCK_D)
        key = origin + block * block_size
        k_base = k + batch * k_batch + kv_head * k_head + key * k_row
        v_base = v + batch * v_batch + kv_head * v_head + key * v_row
        columns = tl.arange(0, BLOCK_N)
        if LIMITED:
            positions = tl.load(about + batch * 2) + row.to(tl.int32)
            low = tl.load(lows + positions)
        acc, top, total = start_softmax(BLOCK_M, BLOCK_D)
        for first in range(0, block_size, BLOCK_N):
            inside = first + columns < block_size
            clamped = columns if EVEN else tl.where(inside, columns, 0)
            visible = inside[None, :]
            if LIMITED:
                keys = (key + first + clamped).to(tl.int32)[None, :]
                visible = visible & (keys >= sinks) & (keys < low[:, None])
                if RINGS + SPANS:
                    shown = shown_by_other_part(
                        keys,
                        positions,
                        head,
                        (batch * HEADS + head) * query_len + row,
                        tl.load(about + batch * 2 + 1),
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
            place = tl.cast(first, tl.int64)
            k_tile = load_rows(k_base + place * k_row, clamped * k_row, HEAD_DIM, BLOCK_D)
            v_tile = load_rows(v_base + place * v_row, clamped * v_row, HEAD_DIM, BLOCK_D)
            acc, top, total = softmax_step(
                acc,
                top,
                total,
                q_tile,
                k_tile,
                v_tile,
                visible,
                scale,
                cap,
                LIMITED or not EVEN,
                CAPPED,
                WIDEN,
            )
        result, log_total = finish_softmax(acc, top, total, scale)
        store_rows(partial, choice * HEAD_DIM, result, real, HEAD_DIM, BLOCK_D, WIDEN)
        tl.store(partial_lse + choice, log_total, mask=real)
