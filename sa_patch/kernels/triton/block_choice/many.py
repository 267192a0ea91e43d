"""Choosing many of all eligible blocks, by the fp32 dot product of a query with their mean keys.

`flat` reads the mean keys again for every few picks, which would be cubic in n where picks grow
with n. Here a tile of queries scores them once, and writes the scores down as ordered numbers. The
smallest one that stays is then built two bits at a time, by counting those above it: the passes do
not depend on how many are chosen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.block_choice.tree import ordered_bits
from sa_patch.kernels.triton.softmax import load_rows, query_tile


@triton.jit
def load_bits(lines: tl.tensor, blocks: tl.tensor, most: tl.tensor) -> tl.tensor:
    """uint32 ``[m, n]`` of `ordered_bits` from ``lines [m]``, 0 for blocks from `most` on."""
    bits = tl.load(lines[:, None] + blocks[None, :], mask=(blocks < most)[None, :], other=0)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["query_len", "blocks", "count", "percent", "least"])
def choose_many_kernel(
    q: tl.tensor,
    means: tl.tensor,
    scores: tl.tensor,
    picks: tl.tensor,
    table: tl.tensor,
    eligible: tl.tensor,
    query_len: tl.tensor,
    blocks: tl.tensor,
    width: tl.tensor,
    count: tl.tensor,
    percent: tl.tensor,
    least: tl.tensor,
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
) -> None:
    """Write the best eligible blocks of each query, ascending; nothing beyond them.

    A query chooses `percent` of its eligible blocks, `least` at least, of equal ones the first.

    Args:
        means: fp32 ``[batch, kv_heads, blocks, HEAD_DIM]``.
        scores: int32 ``[programs, BLOCK_M, width]``, to work in.
        picks: int32 ``[batch, HEADS, query_len, count]``.
        eligible: int32, by position how many of the first blocks a query may choose from; never
            falling.
    """
    batch, head, members, rows, positions, real, first, last = query_tile(
        table, HEADS, query_len, PACK, BLOCK_M
    )
    q_tile = load_rows(q + batch * q_batch, members * q_head + rows * q_row, HEAD_DIM, BLOCK_D)
    q_tile = q_tile.to(tl.float32)
    means += (batch * (HEADS // KV_GROUP) + head // KV_GROUP) * blocks * HEAD_DIM
    own = tl.where(real, tl.load(eligible + positions), 0)
    most = tl.load(eligible + last)
    line = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lines = scores + line * width
    columns = tl.arange(0, BLOCK_N)
    for begin in range(0, most, BLOCK_N):
        block = begin + columns
        clamped = tl.minimum(block, blocks - 1).to(tl.int64)
        mean = load_rows(means, clamped * HEAD_DIM, HEAD_DIM, BLOCK_D)
        dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # As exact as fp32; see `choose_kernel`.
        dots = tl.dot(q_tile, tl.trans(mean), dots, input_precision="tf32x3")
        bits = tl.where(block[None, :] < own[:, None], ordered_bits(dots), 0)
        bits = bits.to(tl.int32, bitcast=True)
        tl.store(lines[:, None] + block[None, :], bits, mask=(block < most)[None, :])
    # Threads read what others wrote.
    tl.debug_barrier()
    limit = tl.maximum(own * percent // 100, least)
    threshold = tl.zeros([BLOCK_M], tl.uint32)
    step = tl.full([BLOCK_M], 1 << 30, tl.uint32)
    above = tl.zeros([BLOCK_M], tl.int32)
    for _ in range(16):
        by_one = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        by_two = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        by_three = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for begin in range(0, most, BLOCK_N):
            bits = load_bits(lines, begin + columns, most)
            by_one += (bits >= (threshold + step)[:, None]).to(tl.int32)
            by_two += (bits >= (threshold + step * 2)[:, None]).to(tl.int32)
            by_three += (bits >= (threshold + step * 3)[:, None]).to(tl.int32)
        one = tl.sum(by_one, 1)
        two = tl.sum(by_two, 1)
        three = tl.sum(by_three, 1)
        # How many lie above the numbers that begin with the digits found so far.
        above = tl.where(three >= limit, above, three)
        above = tl.where(two >= limit, above, two)
        above = tl.where(one >= limit, above, one)
        threshold = tl.where(one >= limit, threshold + step, threshold)
        threshold = tl.where(two >= limit, threshold + step, threshold)
        threshold = tl.where(three >= limit, threshold + step, threshold)
        step = step >> 2
    room = limit - above
    places = picks + ((batch * HEADS + members) * query_len + rows) * count
    tied = tl.zeros([BLOCK_M], tl.int32)
    written = tl.zeros([BLOCK_M], tl.int32)
    for begin in range(0, most, BLOCK_N):
        bits = load_bits(lines, begin + columns, most)
        # Nothing is there where the bits are 0.
        equal = ((bits == threshold[:, None]) & (bits > 0)).to(tl.int32)
        fits = (equal > 0) & (tied[:, None] + tl.cumsum(equal, 1) <= room[:, None])
        best = (bits > threshold[:, None]) | fits
        chosen = best.to(tl.int32)
        place = written[:, None] + tl.cumsum(chosen, 1) - 1
        block = tl.broadcast_to((begin + columns)[None, :], [BLOCK_M, BLOCK_N])
        tl.store(places[:, None] + place, block, mask=best & real[:, None])
        tied += tl.sum(equal, 1)
        written += tl.sum(chosen, 1)
