"""Choosing few of all eligible blocks, by the fp32 dot product of a query with their mean keys.

Serves mixture of block attention and small blocks without a tree (``branch=0``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.softmax import load_rows, query_tile

# A rank is an int64: the score as an ordered integer above, the block counted down below. These
# lie below and above every real one.
NO_RANK = tl.constexpr(-(2**63))
TOP_RANK = tl.constexpr(2**63 - 1)


@triton.jit
def rank(scores: tl.tensor, blocks: tl.tensor) -> tl.tensor:
    """int64 that orders (score, then earlier block); a NaN counts as the largest score."""
    # A sum that begins at zero is never -0, which would rank below 0.
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - blocks).to(tl.int64)


@triton.jit(do_not_specialize=["query_len", "blocks", "count"])
def choose_kernel(
    q: tl.tensor,
    means: tl.tensor,
    picks: tl.tensor,
    table: tl.tensor,
    eligible: tl.tensor,
    query_len: tl.tensor,
    blocks: tl.tensor,
    count: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PICKS: tl.constexpr,
) -> None:
    """Write the best `count` eligible blocks of each query, in any order, -1 beyond them.

    Each sweep over the blocks finds PICKS of them, those that come after the picks before.

    Args:
        means: fp32 ``[batch, kv_heads, blocks, HEAD_DIM]``.
        picks: int32 ``[batch, HEADS, query_len, count]``.
        eligible: int32, by position how many of the first blocks a query may choose from; never
            falling.
    """
    batch, head, members, rows, positions, real, first, last = query_tile(
        table, HEADS, query_len, PACK, BLOCK_M
    )
    q_tile = load_rows(q + batch * q_batch, members * q_head + rows * q_row, HEAD_DIM, BLOCK_D)
    q_tile = q_tile.to(tl.float32)
    kv_head = batch * (HEADS // KV_GROUP) + head // KV_GROUP
    means += kv_head * blocks * HEAD_DIM
    own = tl.load(eligible + positions)
    places = ((batch * HEADS + members) * query_len + rows) * count
    listed = tl.arange(0, PICKS)
    columns = tl.arange(0, BLOCK_N)
    limit = tl.full([BLOCK_M], TOP_RANK, tl.int64)
    for done in range(0, count, PICKS):
        # Surplus places hold the top rank, which nothing displaces.
        wanted = (listed < count - done)[None, :]
        empty = tl.where(wanted, listed[None, :].to(tl.int64) + NO_RANK, TOP_RANK)
        best = tl.zeros([BLOCK_M, PICKS], tl.int64) + empty
        for begin in range(0, tl.load(eligible + last), BLOCK_N):
            block = begin + columns
            clamped = tl.minimum(block, blocks - 1).to(tl.int64)
            mean = load_rows(means, clamped * HEAD_DIM, HEAD_DIM, BLOCK_D)
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            # Three tensor-core products of split numbers: as exact as fp32, and 10 times as fast as
            # fp32 outside the tensor cores (measured on an H200).
            scores = tl.dot(q_tile, tl.trans(mean), scores, input_precision="tf32x3")
            ranks = rank(scores, block[None, :])
            allowed = (block[None, :] < own[:, None]) & (ranks < limit[:, None])
            ranks = tl.where(allowed, ranks, NO_RANK)
            for _ in tl.static_range(PICKS):
                found = tl.max(ranks, 1)
                worst = tl.min(best, 1)
                enters = (best == worst[:, None]) & (found > worst)[:, None]
                best = tl.where(enters, found[:, None], best)
                ranks = tl.where(ranks == found[:, None], NO_RANK, ranks)
        limit = tl.min(best, 1)
        pick = tl.where(best < NO_RANK + PICKS, -1, 0x7FFFFFFF - best.to(tl.int32))
        here = places[:, None] + done + listed[None, :]
        tl.store(picks + here, pick, mask=real[:, None] & wanted)
