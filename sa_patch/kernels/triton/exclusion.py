"""What the Triton kernels of a union's pieces leave out: keys that another piece shows already.

The keys of the local window are told by position. Keys within reach on an earlier ring, and
keys of blocks that an earlier part chose, are told pair by pair here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shown_by_other_part(
    keys: tl.tensor,
    positions: tl.tensor,
    members: tl.tensor,
    choices: tl.tensor,
    number: tl.tensor,
    rings: tl.tensor,
    sizes: tl.tensor,
    padded_len: tl.tensor,
    starts: tl.tensor,
    extents: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RINGS: tl.constexpr,
    DRAWS: tl.constexpr,
    SPANS: tl.constexpr,
) -> tl.tensor:
    """bool ``[m, n]``: whether row m sees key n by one of `RINGS` rings or `SPANS` spans of keys.

    Args:
        keys: int32 ``[m or 1, n]``, positions that exist.
        positions, members: of each row, ``[m]``: position and query head.
        choices: int64 ``[m]``, place of each row among all queries and heads.
        number: which of the batch's lengths this is.
        rings: int32 ``[lengths, RINGS, 1 + DRAWS, padded_len]``: by position the reach of a query,
            then the points of each draw.
        sizes: int32 ``[lengths, RINGS]``, circumferences.
        starts: int32 ``[choices, SPANS]``: first key of each span.
        extents: int32 ``[SPANS]``: its keys.
    """
    shown = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    # A loop of no rounds is compiled all the same.
    if RINGS:
        for ring in range(0, RINGS):
            size = tl.load(sizes + number * RINGS + ring)
            reaches = rings + ((number * RINGS + ring) * (1 + DRAWS)).to(tl.int64) * padded_len
            reach = tl.load(reaches + positions)
            points = reaches + padded_len
            if DRAWS == 1:
                own = tl.load(points + positions)
                theirs = tl.load(points + keys)
            else:
                of_head = members * padded_len
                own = tl.load(points + of_head + positions)
                theirs = tl.load(points + of_head[:, None] + keys)
            distance = tl.abs(theirs - own[:, None])
            distance = tl.minimum(distance, size - distance)
            shown = shown | (distance <= reach[:, None]).to(tl.int32)
    if SPANS:
        for span in range(0, SPANS):
            ahead = keys - tl.load(starts + choices * SPANS + span)[:, None]
            extent = tl.load(extents + span).to(tl.uint32, bitcast=True)
            shown = shown | (ahead.to(tl.uint32, bitcast=True) < extent).to(tl.int32)
    return shown > 0
