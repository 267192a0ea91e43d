"""Triton kernel of small chosen blocks: each query gathers its keys.

Hardly two queries share their blocks, so that there are no tiles to multiply, and few keys to each
query: products of vectors do, and the time goes into reading keys. Query heads that share a choice
stand beside each other in a tile, so that one reads its keys for all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.exclusion import shown_by_other_part
from sa_patch.kernels.triton.softmax import (
    hyperbolic_tangent,
    load_rows,
    query_tile,
    start_softmax,
    store_result,
)


@triton.jit
def load_gathered(
    base: tl.tensor, offsets: tl.tensor, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """Rows that begin at ``base + offsets [m, n]`` as fp32 ``[m, n, BLOCK_D]``, zero beyond
    HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)[None, None, :]
    places = base + offsets[:, :, None] + columns
    if HEAD_DIM == BLOCK_D:
        loaded = tl.load(places)
    else:
        loaded = tl.load(places, mask=columns < HEAD_DIM, other=0.0)
    return loaded.to(tl.float32)


@triton.jit(do_not_specialize=["query_len", "block_size", "origin", "count", "sinks", "padded_len"])
def small_blocks_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    table: tl.tensor,
    lows: tl.tensor,
    picks: tl.tensor,
    query_len: tl.tensor,
    block_size: tl.tensor,
    origin: tl.tensor,
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
    CHOOSERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RINGS: tl.constexpr,
    DRAWS: tl.constexpr,
    SPANS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    JOIN: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One tile of queries, of PACK query heads that share a KV head.

    Args:
        q, k, v, out: by strides of batch, head and row; lse fp32 ``[batch, HEADS, query_len]``.
        table, lows, sinks: of `local_window_kernel`, whose keys are left out.
        picks: int32 ``[batch, CHOOSERS, query_len, count]``: the chosen blocks, -1 for none.
        origin: the token that block 0 begins with.
        scale: at least 0, with log2(e) in it.
        cap: of `softmax_step`.
        rings ... SPANS: of `shown_by_other_part`.
    """
    batch, head, members, rows, positions, real, first, last = query_tile(
        table, HEADS, query_len, PACK, BLOCK_M
    )
    entry = table + tl.program_id(0) // (HEADS // PACK) * 5
    places = (batch * HEADS + members) * query_len + rows
    listed = (batch * CHOOSERS + members // (HEADS // CHOOSERS)) * query_len + rows
    q_tile = load_rows(q + batch * q_batch, members * q_head + rows * q_row, HEAD_DIM, BLOCK_D)
    q_tile = q_tile.to(tl.float32)
    k_base = k + batch * k_batch + (head // KV_GROUP).to(tl.int64) * k_head
    v_base = v + batch * v_batch + (head // KV_GROUP).to(tl.int64) * v_head
    low = tl.where(real, tl.load(lows + positions), 0)
    acc, top, total = start_softmax(BLOCK_M, BLOCK_D)
    for begin in range(0, count * block_size, BLOCK_N):
        number = begin + tl.arange(0, BLOCK_N)
        inside = (number < count * block_size)[None, :]
        chosen = tl.where(inside, (number // block_size)[None, :], 0)
        block = tl.load(picks + listed[:, None] * count + chosen)
        keys = block * block_size + origin + (number % block_size)[None, :]
        visible = inside & (block >= 0) & (keys >= sinks) & (keys < low[:, None])
        keys = tl.where(visible, keys, 0)
        if RINGS + SPANS:
            shown = shown_by_other_part(
                keys,
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
        keys = keys.to(tl.int64)
        gathered = load_gathered(k_base, keys * k_row, HEAD_DIM, BLOCK_D)
        scores = tl.sum(q_tile[:, None, :] * gathered, 2)
        if CAPPED:
            scores = hyperbolic_tangent(cap * scores)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # Where no key was visible so far the pivot must be finite: -inf - -inf is not a number.
        pivot = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * scale - (pivot * scale)[:, None])
        faded = tl.exp2((top - pivot) * scale)
        gathered = load_gathered(v_base, keys * v_row, HEAD_DIM, BLOCK_D)
        acc = acc * faded[:, None] + tl.sum(weights[:, :, None] * gathered, 1)
        total = total * faded + tl.sum(weights, 1)
        top = higher
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
