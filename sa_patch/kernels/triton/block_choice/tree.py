"""Choosing blocks coarse to fine: the whole beam search of a tile of queries in one program.

The same search as `patterns.block_selection.tree`, whose docstring defines it. A query has few
candidates on a level, hardly any of them its neighbours', so that products of vectors do, and the
time goes into reading mean keys. The nodes kept on a level are found by their number: the smallest
score that stays is built bit by bit, by counting the candidates above it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sa_patch.kernels.triton.softmax import query_tile

# Columns of the mean keys that are read at once: two sectors of memory each.
COLUMNS = tl.constexpr(16)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def ordered_bits(scores: tl.tensor) -> tl.tensor:
    """uint32 above 0, in the order of the fp32 scores; NaN and -inf count as the lowest number."""
    scores = tl.where(scores != scores, -LARGEST, scores)
    scores = tl.minimum(tl.maximum(scores, -LARGEST), LARGEST)
    # -0 and 0 are one score.
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def best_of_row(
    bits: tl.tensor, present: tl.tensor, limit: tl.tensor, BLOCK_M: tl.constexpr
) -> tl.tensor:
    """bool ``[m, n]``: the `limit` largest present entries of each row, of equal ones the first.

    Args:
        bits: uint32 ``[m, n]`` above 0, 0 where nothing is `present`.
        limit: at least 1; where fewer are present, all of them are meant.
    """
    threshold = tl.zeros([BLOCK_M], tl.uint32)
    bit = tl.full([BLOCK_M], 1 << 31, tl.uint32)
    for _ in range(32):
        higher = threshold | bit
        enough = tl.sum((bits >= higher[:, None]).to(tl.int32), 1) >= limit
        threshold = tl.where(enough, higher, threshold)
        bit = bit >> 1
    above = bits > threshold[:, None]
    equal = (present & (bits == threshold[:, None])).to(tl.int32)
    room = limit - tl.sum(above.to(tl.int32), 1)
    return above | ((equal > 0) & (tl.cumsum(equal, 1) <= room[:, None]))


@triton.jit(do_not_specialize=["query_len", "blocks", "levels", "span", "topk", "beam", "branch"])
def tree_search_kernel(
    q: tl.tensor,
    means: tl.tensor,
    kept: tl.tensor,
    picks: tl.tensor,
    table: tl.tensor,
    eligible: tl.tensor,
    query_len: tl.tensor,
    blocks: tl.tensor,
    nodes: tl.tensor,
    levels: tl.tensor,
    span: tl.tensor,
    topk: tl.tensor,
    beam: tl.tensor,
    branch: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write the `topk` blocks that each query's search finds, ascending; nothing beyond them.

    Args:
        q: by strides of batch, head and row; the queries of GROUP heads are added.
        means: fp32 ``[batch, kv_heads, nodes, HEAD_DIM]``, mean keys of all nodes, the level of the
            fewest first; level l has ``blocks // branch**l``.
        kept: int32 ``[batch, HEADS, query_len, beam]``, to work in: nodes of the level before.
        picks: int32 ``[batch, HEADS, query_len, topk]``.
        eligible: int32, by position how many of the first blocks a query may choose from; never
            falling.
        levels: so many that on a further one no query knows more than `beam` nodes.
        span: blocks of a node of the first level, ``branch**(levels - 1)``.
        HEADS, KV_GROUP: choosers, and those of a KV head.
        BLOCK_N: at least ``beam * branch + branch - 1``, a query's candidates on a level.
    """
    batch, head, members, rows, positions, real, first, last = query_tile(
        table, HEADS, query_len, 1, BLOCK_M
    )
    q_rows = q + batch * q_batch + members * GROUP * q_head + rows * q_row
    means += (batch * (HEADS // KV_GROUP) + head // KV_GROUP) * nodes * HEAD_DIM
    places = (batch * HEADS + members) * query_len + rows
    own = tl.where(real, tl.load(eligible + positions), 0)
    most = tl.load(eligible + last)
    slots = tl.arange(0, BLOCK_N)[None, :]
    columns = tl.arange(0, COLUMNS)
    for _ in range(levels):
        # All nodes of a level stay where a query knows `beam` of them at most.
        if (span == 1) | (most // span > beam):
            known = (own // span)[:, None]
            parents = known // branch
            chosen = parents > beam
            children = tl.minimum(parents, beam) * branch
            # Parents ascend, and nodes that have none yet follow, so that candidates ascend.
            inherited = slots < children
            parent = tl.load(
                kept + places[:, None] * beam + slots // branch, mask=inherited & chosen, other=0
            )
            parent = tl.where(chosen, parent, slots // branch)
            node = tl.where(
                inherited,
                parent * branch + slots % branch,
                parents * branch + slots - children,
            )
            present = node < known
            at = tl.where(present, node, 0).to(tl.int64) * HEAD_DIM
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for begin in range(0, HEAD_DIM, COLUMNS):
                inside = begin + columns < HEAD_DIM
                q_part = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
                for of_group in range(GROUP):
                    q_places = (q_rows + tl.cast(of_group, tl.int64) * q_head)[:, None]
                    q_part += tl.load(
                        q_places + (begin + columns)[None, :], mask=inside[None, :], other=0.0
                    ).to(tl.float32)
                mean = tl.load(
                    means + at[:, :, None] + (begin + columns)[None, None, :],
                    mask=present[:, :, None] & inside[None, None, :],
                    other=0.0,
                )
                scores += tl.sum(q_part[:, None, :] * mean, 2)
            bits = tl.where(present, ordered_bits(scores), 0)
            limit = tl.where(span == 1, topk, beam)
            best = best_of_row(bits, present, limit, BLOCK_M)
            place = tl.cumsum(best.to(tl.int32), 1) - 1
            best = best & real[:, None]
            # Threads read what others wrote on the level before, and write over it.
            tl.debug_barrier()
            if span == 1:
                tl.store(picks + places[:, None] * topk + place, node, mask=best)
            else:
                tl.store(kept + places[:, None] * beam + place, node, mask=best)
            tl.debug_barrier()
        means += (blocks // span).to(tl.int64) * HEAD_DIM
        span = span // branch
