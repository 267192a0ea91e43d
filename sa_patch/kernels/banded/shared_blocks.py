"""Attention over blocks that a tile of queries shares: matrices of queries and keys, no sorting.

A tile's blocks stand in the order in which they were chosen, and are taken so many at a time: what
a query sums up has one shape and one order, whatever later queries chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.kernels.merge import attend_with_lse
from sa_patch.patterns.block_selection.shared_choice import tile_choices

# Keys of a step: enough to fill matrix products, few enough to waste little at a tile's end.
_STEP_KEYS = 128
# Keys that are gathered at once.
_GATHERED = 1 << 15


def attend_shared_blocks(
    own_choices: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shared: int,
    first: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of one sequence over what their tiles chose so far.

    Not differentiable.

    Args:
        own_choices: int64 ``[choosers, nq, topk]``, of each query alone, -1 for none; a chooser is
            a query head, or a KV head for all of its query heads.
        q: ``[q_heads, nq, head_dim]``, fp32 or fp64; the first query begins a tile.
        k, v: ``[kv_heads, n, head_dim]``, like q, the keys scaled.
        shared: queries of a tile.
        first: the token that block 0 begins with.
        size: tokens of a block.

    Returns:
        Output ``[q_heads, nq, head_dim]``, zero where nothing is seen, and the log-sum-exp of the
        scores ``[q_heads, nq]``, -inf there.
    """
    queries = q.shape[1]
    blocks, first_row, _ = tile_choices(own_choices, shared)
    choosers, tiles, _ = blocks.shape
    # Query heads of a chooser share its tiles' keys: [choosers, tiles, heads, shared, head_dim].
    padded = torch.nn.functional.pad(q, (0, 0, 0, tiles * shared - queries))
    q_tiles = padded.unflatten(0, (choosers, -1)).unflatten(2, (tiles, shared)).transpose(1, 2)
    q_tiles = q_tiles.flatten(0, 1).contiguous()
    out = torch.zeros_like(q_tiles)
    lse = q_tiles.new_full(q_tiles.shape[:3], -torch.inf)
    per_step = max(1, _STEP_KEYS // size)
    # Whole steps for every tile; what is left over is hidden.
    missing = -blocks.shape[2] % per_step
    blocks = torch.nn.functional.pad(blocks, (0, missing), value=-1).flatten(0, 1)
    first_row = torch.nn.functional.pad(first_row, (0, missing)).flatten(0, 1)
    counts = (blocks >= 0).sum(-1)
    at_once = max(1, _GATHERED // (per_step * size))
    for low in range(0, int(counts.max()) if len(counts) else 0, per_step):
        (left,) = (counts > low).nonzero(as_tuple=True)
        step = slice(low, low + per_step)
        for members in left.split(at_once):
            part, part_lse = _attend_step(
                q_tiles[members],
                k,
                v,
                blocks[members, step],
                first_row[members, step],
                kv_head=members // tiles * len(k) // choosers,
                first=first,
                size=size,
            )
            before = lse[members]
            both = torch.logaddexp(before, part_lse)
            weight = (part_lse - both).exp().nan_to_num_(nan=0.0)
            lse[members] = both
            out[members] = torch.lerp(out[members], part, weight[..., None])
    out = out.unflatten(0, (choosers, tiles)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    lse = lse.unflatten(0, (choosers, tiles)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return out[:, :queries], lse[:, :queries]


def _attend_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    first_row: Tensor,
    *,
    kv_head: Tensor,
    first: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Attention of tiles over a few of their blocks.

    Args:
        q: ``[tiles, heads, shared, head_dim]``.
        blocks, first_row: ``[tiles, m]``.
        kv_head: int64 ``[tiles]``.

    Returns:
        Output like q, finite, and its log-sum-exp, -inf where nothing is seen.
    """
    offsets = torch.arange(size, device=q.device)
    keys = (blocks.clamp(min=0)[..., None] * size + offsets).flatten(1) + first
    places = keys + kv_head[:, None] * k.shape[1]
    rows = torch.arange(q.shape[2], device=q.device)
    seen = (blocks >= 0)[:, None] & (first_row[:, None] <= rows[:, None])
    seen = seen.repeat_interleave(size, dim=-1)[:, None]
    k_tiles, v_tiles = (x.flatten(0, 1)[places][:, None] for x in (k, v))
    out, lse = attend_with_lse(q, k_tiles, v_tiles, seen, scale=1.0)
    return out.masked_fill(lse[..., None] == -torch.inf, 0), lse
