"""Triton kernel of tokens on a ring: stochastic attention and its prefix-stable kin.

A tile holds queries that are neighbours on the ring. Their keys are some of the band around them,
sorted by position (`ring_tiles`) and gathered, and the results are scattered back to where
the queries stood.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.exclusion import shown_by_other_part
from sa_patch.kernels.triton.softmax import (
    UNSEEN,
    first_column,
    load_rows,
    softmax_step,
    start_softmax,
    store_result,
)


@triton.jit(do_not_specialize=["entries", "query_len", "padded_len"])
def ring_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    table: tl.tensor,
    queries: tl.tensor,
    query_steps: tl.tensor,
    windows: tl.tensor,
    keys: tl.tensor,
    key_steps: tl.tensor,
    counts: tl.tensor,
    skips: tl.tensor,
    rings: tl.tensor,
    sizes: tl.tensor,
    entries: tl.tensor,
    query_len: tl.tensor,
    width: tl.tensor,
    padded_len: tl.tensor,
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
    HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SLOT_ORDER: tl.constexpr,
    RINGS: tl.constexpr,
    DRAWS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOIN: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One tile of queries, of PACK query heads that share a KV head.

    Args:
        q, k, v, out: by strides of batch, head and row; lse fp32 ``[batch, HEADS, query_len]``.
        table: int32 ``[entries, 7]``, of `ring_table`: blocks of TILES tiles.
        queries, query_steps, windows, keys, key_steps, counts, skips: of `RingPlan`.
        rings, sizes, padded_len: of `shown_by_other_part`; read where there are RINGS.
        width: keys of a band, padding counted.
        scale: at least 0, with log2(e) in it.
        cap: of `softmax_step`.
        SLOT_ORDER: k and v stand in the order of slots, and are read by slot.
    """
    SLOTS: tl.constexpr = BLOCK_M // PACK
    program = tl.program_id(0)
    # Heads of a tile run together, and tiles of a block that need the most keys come first.
    head = program % (HEADS // PACK) * PACK
    work = program // (HEADS // PACK)
    entry = table + work % entries * 7
    batch = tl.load(entry).to(tl.int64)
    length = tl.load(entry + 3)
    first_slot = tl.load(entry + 4)
    start = tl.load(entry + 5)
    number = tl.load(entry + 6)
    tile = TILES - 1 - work // entries
    block = tl.load(entry + 1).to(tl.int64)
    if PER_HEAD:
        block += head * tl.load(entry + 2)
    slot = tl.arange(0, BLOCK_M) // PACK
    used = slot < SLOTS
    members = (head + tl.arange(0, BLOCK_M) % PACK).to(tl.int64)
    planned = (block * TILES + tile) * SLOTS + slot
    positions = tl.load(queries + planned, mask=used, other=UNSEEN)
    steps = tl.load(query_steps + planned, mask=used, other=0)
    window = tl.load(windows + planned, mask=used, other=0).to(tl.uint32, bitcast=True)
    real = positions < length
    positions = tl.where(real, positions, length - 1)
    # Rows that are no query see nothing, read the first, and write nothing.
    seen = tl.where(real, tl.load(counts + planned, mask=used, other=0), 0)
    rows = tl.where(real, positions - start, 0).to(tl.int64)
    q_tile = load_rows(q + batch * q_batch, members * q_head + rows * q_row, HEAD_DIM, BLOCK_D)
    own = first_column(start)
    k_base = k + batch * k_batch + (head // KV_GROUP).to(tl.int64) * k_head + own * k_row
    v_base = v + batch * v_batch + (head // KV_GROUP).to(tl.int64) * v_head + own * v_row
    acc, top, total = start_softmax(BLOCK_M, BLOCK_D)
    count = tl.max(seen, 0)
    for begin in range(tl.load(skips + block), count, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        inside = key < count
        step = tl.load(key_steps + block * width + key, mask=inside, other=0)
        ahead = step[None, :] - steps[:, None]
        near_enough = ahead.to(tl.uint32, bitcast=True) < window[:, None]
        visible = near_enough & (key[None, :] < seen[:, None])
        if SLOT_ORDER:
            # A band may begin before slot 0 and end beyond the last.
            places = ((first_slot + step + length) % length).to(tl.int64)
        else:
            position = tl.load(keys + block * width + key, mask=inside, other=0)
            places = position.to(tl.int64)
            if RINGS:
                shown = shown_by_other_part(
                    position[None, :],
                    positions,
                    members,
                    rows,
                    number,
                    rings,
                    sizes,
                    padded_len,
                    sizes,
                    sizes,
                    BLOCK_M,
                    BLOCK_N,
                    RINGS,
                    DRAWS,
                    0,
                )
                visible = visible & (shown == 0)
        k_tile = load_rows(k_base, places * k_row, HEAD_DIM, BLOCK_D)
        v_tile = load_rows(v_base, places * v_row, HEAD_DIM, BLOCK_D)
        acc, top, total = softmax_step(
            acc, top, total, q_tile, k_tile, v_tile, visible, scale, cap, True, CAPPED, WIDEN
        )
    store_result(
        out + batch * out_batch,
        lse,
        members * out_head + rows * out_row,
        (batch * HEADS + members) * query_len + rows,
        (acc, top, total),
        scale,
        real,
        HEAD_DIM,
        BLOCK_D,
        WITH_LSE,
        JOIN,
        WIDEN,
    )
