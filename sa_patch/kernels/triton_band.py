"""Triton kernel of a band with online softmax: full, sliding-window and stochastic attention.

One program serves a tile of queries for the query heads that share a KV head. In a sliding window
(full attention is a very wide one) the queries are neighbours and their keys contiguous. In
stochastic attention they are neighbours by slot, their keys are the leading ones of the band of
slots around them (`ring_tiles`), gathered by position, and the results are scattered back to where
the queries stood.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton_softmax import (
    finish_softmax,
    load_rows,
    softmax_step,
    start_softmax,
    store_rows,
)

LN_2 = tl.constexpr(0.6931471805599453)
# Later than every position, and so never visible.
UNSEEN = tl.constexpr(2**31 - 1)


@triton.jit
def window_walk(
    state: tl.tensor,
    q: tl.tensor,
    k_base: tl.tensor,
    v_base: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    positions: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Keys of queries at ``first .. last``: blocks that all of them see whole, then the edges."""
    acc, top, total = state
    columns = tl.arange(0, BLOCK_N)
    begin = tl.maximum(0, first - window + 1) // BLOCK_N * BLOCK_N
    whole = (tl.maximum(0, last - window + 1) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_end = (first + 1) // BLOCK_N * BLOCK_N
    # A loop of its own must repay the filling of its pipeline.
    if whole_end < whole + 4 * BLOCK_N:
        whole = begin
        whole_end = begin
    for inner in range(whole, whole_end, BLOCK_N):
        place = tl.cast(inner, tl.int64)
        k = load_rows(k_base + place * k_row, columns * k_row, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base + place * v_row, columns * v_row, HEAD_DIM, BLOCK_D)
        acc, top, total = softmax_step(acc, top, total, q, k, v, columns, scale, False, WIDEN)
    skipped = whole_end - whole
    for edge in range(begin, last + 1 - skipped, BLOCK_N):
        key = tl.where(edge < whole, edge, edge + skipped)
        behind = positions[:, None] - (key + columns)[None, :]
        # As unsigned numbers those behind zero are the largest.
        visible = behind.to(tl.uint32, bitcast=True) < window.to(tl.uint32)
        near = tl.minimum(columns, last - key)
        place = tl.cast(key, tl.int64)
        k = load_rows(k_base + place * k_row, near * k_row, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base + place * v_row, near * v_row, HEAD_DIM, BLOCK_D)
        acc, top, total = softmax_step(acc, top, total, q, k, v, visible, scale, True, WIDEN)
    return acc, top, total


@triton.jit
def ring_walk(
    state: tl.tensor,
    q: tl.tensor,
    k_base: tl.tensor,
    v_base: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    seen: tl.tensor,
    steps: tl.tensor,
    keys: tl.tensor,
    key_steps: tl.tensor,
    count: tl.tensor,
    first_slot: tl.tensor,
    length: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOT_ORDER: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """The first `count` of a band's sorted keys, of which each row may see the first `seen`.

    With SLOT_ORDER, k and v are read by slot.
    """
    acc, top, total = state
    for begin in range(0, count, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        inside = key < count
        step = tl.load(key_steps + key, mask=inside, other=0)
        ahead = step[None, :] - steps[:, None]
        near_enough = ahead.to(tl.uint32, bitcast=True) < window.to(tl.uint32)
        visible = near_enough & (key[None, :] < seen[:, None])
        if SLOT_ORDER:
            # A band may begin before slot 0 and end beyond the last.
            near = ((first_slot + step + length) % length).to(tl.int64)
        else:
            near = tl.load(keys + key, mask=inside, other=0).to(tl.int64)
        k = load_rows(k_base, near * k_row, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base, near * v_row, HEAD_DIM, BLOCK_D)
        acc, top, total = softmax_step(acc, top, total, q, k, v, visible, scale, True, WIDEN)
    return acc, top, total


@triton.jit(do_not_specialize=["entries", "query_len", "window"])
def band_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    table: tl.tensor,
    queries: tl.tensor,
    query_steps: tl.tensor,
    keys: tl.tensor,
    key_steps: tl.tensor,
    counts: tl.tensor,
    entries: tl.tensor,
    query_len: tl.tensor,
    window: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
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
    RING: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SLOT_ORDER: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One tile of queries, of PACK query heads that share a KV head.

    Args:
        q, k, v, out: by strides of batch, head and row; lse fp32 ``[batch, HEADS, query_len]``.
        table: int32 ``[entries, 5]``: row of the batch, first query, position of the row's first
            query, length, unused. With RING an entry is a block of TILES tiles: row of the batch,
            block of the plan, blocks of one draw, length, first slot.
        queries, query_steps, keys, key_steps, counts: of `RingPlan`; read with RING.
        window: keys in view; with RING the ``2 * reach + 1`` steps of a band in view.
        width: keys of a band, padding counted; read with RING.
        scale: at least 0, with log2(e) in it.
    """
    SLOTS: tl.constexpr = BLOCK_M // PACK
    program = tl.program_id(0)
    # Heads of a tile run together, and tiles of a block that need the most keys come first.
    head = program % (HEADS // PACK) * PACK
    work = program // (HEADS // PACK)
    entry = table + work % entries * 5
    batch = tl.load(entry).to(tl.int64)
    length = tl.load(entry + 3)
    slot = tl.arange(0, BLOCK_M) // PACK
    used = slot < SLOTS
    heads = (head + tl.arange(0, BLOCK_M) % PACK).to(tl.int64)
    if RING:
        tile = TILES - 1 - work // entries
        block = tl.load(entry + 1).to(tl.int64)
        if PER_HEAD:
            block += head * tl.load(entry + 2)
        places = (block * TILES + tile) * SLOTS + slot
        rows = tl.load(queries + places, mask=used, other=UNSEEN)
        steps = tl.load(query_steps + places, mask=used, other=0)
        real = rows < length
        # Rows that are no query see nothing.
        seen = tl.where(real, tl.load(counts + places, mask=used, other=0), 0)
    else:
        first = tl.load(entry + 1)
        offset = tl.load(entry + 2)
        rows = first + slot
        real = used & (rows < query_len) & (offset + rows < length)
        positions = tl.where(real, offset + rows, -1)
    # They read the first query, and write nothing.
    rows = tl.where(real, rows, 0).to(tl.int64)
    q_tile = load_rows(q + batch * q_batch, heads * q_head + rows * q_row, HEAD_DIM, BLOCK_D)
    k_base = k + batch * k_batch + (head // KV_GROUP).to(tl.int64) * k_head
    v_base = v + batch * v_batch + (head // KV_GROUP).to(tl.int64) * v_head
    state = start_softmax(BLOCK_M, BLOCK_D)
    if RING:
        state = ring_walk(
            state,
            q_tile,
            k_base,
            v_base,
            k_row,
            v_row,
            seen,
            steps,
            keys + block * width,
            key_steps + block * width,
            tl.max(seen, 0),
            tl.load(entry + 4) - window // 2,
            length,
            window,
            scale,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            SLOT_ORDER,
            WIDEN,
        )
    else:
        state = window_walk(
            state,
            q_tile,
            k_base,
            v_base,
            k_row,
            v_row,
            positions,
            offset + first,
            tl.minimum(length, offset + tl.minimum(query_len, first + SLOTS)) - 1,
            window,
            scale,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            WIDEN,
        )
    acc, top, total = state
    result, log_total = finish_softmax(acc, top, total, scale)
    offsets = heads * out_head + rows * out_row
    store_rows(out + batch * out_batch, offsets, result, real, HEAD_DIM, BLOCK_D, WIDEN)
    if WITH_LSE:
        places = (batch * HEADS + heads) * query_len + rows
        tl.store(lse + places, log_total * LN_2, mask=real)
