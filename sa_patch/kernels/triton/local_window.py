"""Triton kernel of the local window: the first tokens, and the keys from some position on.

That is full attention, sliding windows, sinks, the own block of block choices, and unions of these.
One program serves a tile of neighbouring queries for the query heads that share a KV head. Partial
results over chosen blocks, where there are any, are taken in at its end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.softmax import (
    finish_softmax,
    first_column,
    join,
    load_rows,
    query_tile,
    softmax_step,
    start_softmax,
    store_result,
)


@triton.jit
def local_window_walk(
    state: tl.tensor,
    q: tl.tensor,
    k_base: tl.tensor,
    v_base: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    positions: tl.tensor,
    reach: tl.tensor,
    limits: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    first_low: tl.tensor,
    last_low: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """The nearest ``reach [m]`` and the first ``limits [m]`` keys of queries at ``first .. last``,
    which do not overlap: blocks that all of them see whole, then the rest.

    Args:
        first_low, last_low: where the nearest keys of the first and the last query begin; those of
            queries between begin between.
    """
    acc, top, total = state
    columns = tl.arange(0, BLOCK_N)
    begin = first_low // BLOCK_N * BLOCK_N
    whole = (last_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    whole_end = (first + 1) // BLOCK_N * BLOCK_N
    # A loop of its own must repay the filling of its pipeline.
    if whole_end < whole + 4 * BLOCK_N:
        whole = begin
        whole_end = begin
    for inner in range(whole, whole_end, BLOCK_N):
        place = tl.cast(inner, tl.int64)
        k = load_rows(k_base + place * k_row, columns * k_row, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base + place * v_row, columns * v_row, HEAD_DIM, BLOCK_D)
        acc, top, total = softmax_step(
            acc, top, total, q, k, v, columns, scale, cap, False, CAPPED, WIDEN
        )
    skipped = whole_end - whole
    # The first keys stand before the nearest, or among their blocks.
    last_limit = tl.max(limits, 0)
    ahead = tl.minimum(begin, (last_limit + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    # Rows that see first keys alone have no others.
    end = tl.where(tl.max(reach, 0) > 0, last + 1 - skipped, tl.maximum(begin, last_limit))
    for edge in range(begin - ahead, end, BLOCK_N):
        key = tl.where(edge < begin, edge - begin + ahead, edge)
        key = tl.where(edge < whole, key, edge + skipped)
        keys = (key + columns)[None, :]
        # As unsigned numbers those behind zero are the largest.
        behind = (positions[:, None] - keys).to(tl.uint32, bitcast=True)
        visible = (behind < reach.to(tl.uint32, bitcast=True)[:, None]) | (keys < limits[:, None])
        clamped = tl.minimum(columns, last - key)
        place = tl.cast(key, tl.int64)
        k = load_rows(k_base + place * k_row, clamped * k_row, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base + place * v_row, clamped * v_row, HEAD_DIM, BLOCK_D)
        acc, top, total = softmax_step(
            acc, top, total, q, k, v, visible, scale, cap, True, CAPPED, WIDEN
        )
    return acc, top, total


@triton.jit
def join_choices(
    state: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    picks: tl.tensor,
    picked: tl.tensor,
    parts: tl.tensor,
    count: tl.tensor,
    real: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Take in the partial results of `count` picks of each row; the scale is 1 from then on.

    Args:
        picked, parts: int64 ``[m]``, where each row's picks and partial results begin.
    """
    acc, top, total = state
    acc, top = finish_softmax(acc, top, total, scale)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    for number in range(0, count):
        made = real & (tl.load(picks + picked + number, mask=real, other=-1) >= 0)
        part_lse = tl.load(partial_lse + parts + number, mask=made, other=float("-inf"))
        places = tl.where(made, parts + number, 0) * HEAD_DIM
        part = load_rows(partial, places, HEAD_DIM, BLOCK_D)
        # What was never written may hold NaN, and 0 * NaN would stay.
        part = tl.where(made[:, None], part, 0.0)
        acc, top, total = join(acc, top, total, part, part_lse)
    return acc, top, total


@triton.jit(do_not_specialize=["query_len", "sinks", "count"])
def local_window_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    table: tl.tensor,
    lows: tl.tensor,
    partial: tl.tensor,
    partial_lse: tl.tensor,
    picks: tl.tensor,
    query_len: tl.tensor,
    sinks: tl.tensor,
    count: tl.tensor,
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
    CHOOSERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHOSEN: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOIN: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One tile of queries, of PACK query heads that share a KV head.

    Args:
        q, k, v, out: by strides of batch, head and row; lse fp32 ``[batch, HEADS, query_len]``.
        table: of `band_table`.
        lows: int32, by position; query i sees ``lows[i] <= j <= i`` and ``j < sinks``.
        partial, partial_lse, picks: of `Choices`, `count` to a query; read with CHOSEN.
        scale: at least 0, with log2(e) in it.
        cap: of `softmax_step`.
    """
    batch, head, members, rows, positions, real, first, last = query_tile(
        table, HEADS, query_len, PACK, BLOCK_M
    )
    q_tile = load_rows(q + batch * q_batch, members * q_head + rows * q_row, HEAD_DIM, BLOCK_D)
    own = first_column(tl.load(table + tl.program_id(0) // (HEADS // PACK) * 5 + 2))
    k_base = k + batch * k_batch + (head // KV_GROUP).to(tl.int64) * k_head + own * k_row
    v_base = v + batch * v_batch + (head // KV_GROUP).to(tl.int64) * v_head + own * v_row
    low = tl.load(lows + positions)
    reach = tl.where(real, positions + 1 - low, 0)
    limits = tl.where(real, tl.minimum(low, sinks), 0)
    state = start_softmax(BLOCK_M, BLOCK_D)
    state = local_window_walk(
        state,
        q_tile,
        k_base,
        v_base,
        k_row,
        v_row,
        positions,
        reach,
        limits,
        first,
        last,
        tl.load(lows + first),
        tl.load(lows + last),
        scale,
        cap,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        CAPPED,
        WIDEN,
    )
    places = (batch * HEADS + members) * query_len + rows
    if CHOSEN:
        chooser = batch * CHOOSERS + members // (HEADS // CHOOSERS)
        parts = ((batch * query_len + rows) * HEADS + members) * count
        state = join_choices(
            state,
            partial,
            partial_lse,
            picks,
            (chooser * query_len + rows) * count,
            parts,
            count,
            real,
            scale,
            HEAD_DIM,
            BLOCK_D,
        )
        scale = 1.0
    offsets = members * out_head + rows * out_row
    store_result(
        out + batch * out_batch,
        lse,
        offsets,
        places,
        state,
        scale,
        real,
        HEAD_DIM,
        BLOCK_D,
        WITH_LSE,
        JOIN,
        WIDEN,
    )
