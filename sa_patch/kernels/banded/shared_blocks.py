"""Attention over blocks that a tile of queries shares: matrices of queries and keys, no sorting.

A tile's blocks stand in the order in which they were chosen, and are taken so many at a time: what
a query sums up has one shape and one order, whatever later queries chose. Tiles with about as many
blocks go together, few enough to stay in the caches from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_patch.kernels.merge import attend_with_lse, hidden_score
from sa_patch.patterns.block_selection.shared_choice import tile_choices

# Keys of a step: enough to fill matrix products, few enough to waste little at a tile's end.
_STEP_KEYS = 128
# Rows of queries and keys that go together.
_ROWS = 1 << 12


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
        Output ``[q_heads, nq, head_dim]``, finite, and the log-sum-exp of the scores
        ``[q_heads, nq]``, -inf where nothing is seen.
    """
    queries = q.shape[1]
    blocks, first_row, counts = tile_choices(own_choices, shared)
    choosers, tiles, _ = blocks.shape
    heads = len(q) // choosers
    per_step = max(1, _STEP_KEYS // size)
    # Whole steps for every tile; what is left over comes after the last row.
    first_row = first_row.masked_fill(blocks < 0, shared)
    missing = -blocks.shape[2] % per_step
    blocks = torch.nn.functional.pad(blocks, (0, missing), value=-1).flatten(0, 1)
    first_row = torch.nn.functional.pad(first_row, (0, missing), value=shared).flatten(0, 1)
    q_rows = torch.nn.functional.pad(q, (0, 0, 0, tiles * shared - queries)).reshape(
        len(q) * tiles, shared * q.shape[2]
    )
    out = torch.zeros_like(q_rows)
    lse = q.new_full((len(q) * tiles, shared), -torch.inf)
    counts, order = counts.flatten().sort(descending=True, stable=True)
    at_once = max(1, _ROWS // (heads * shared + _STEP_KEYS))
    for most, members in zip(counts[::at_once].tolist(), order.split(at_once), strict=True):
        if not most:
            break
        chooser, tile = members // tiles, members % tiles
        rows = (chooser * heads)[:, None] + torch.arange(heads, device=q.device)
        rows = (rows * tiles + tile[:, None]).flatten()
        out[rows], lse[rows] = (
            found.flatten(0, 1).flatten(1)
            for found in _attend_tiles(
                q_rows.index_select(0, rows).view(len(members), heads, shared, -1),
                k,
                v,
                blocks[members, : -(-most // per_step) * per_step].split(per_step, dim=1),
                first_row[members, : -(-most // per_step) * per_step].split(per_step, dim=1),
                kv_head=chooser * len(k) // choosers,
                first=first,
                size=size,
            )
        )
    out, lse = out.view(len(q), tiles * shared, -1), lse.view(len(q), -1)
    return out[:, :queries], lse[:, :queries]


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[Tensor],
    first_row: Sequence[Tensor],
    *,
    kv_head: Tensor,
    first: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Attention of tiles over their blocks.

    Args:
        q: ``[tiles, heads, shared, head_dim]``.
        blocks, first_row: for each step ``[tiles, m]``.
        kv_head: int64 ``[tiles]``.

    Returns:
        Output like q, finite, and its log-sum-exp, -inf where nothing is seen.
    """
    found: tuple[Tensor, Tensor] | None = None
    for step_blocks, step_rows in zip(blocks, first_row, strict=True):
        part, part_lse = _attend_step(
            q, k, v, step_blocks, step_rows, kv_head=kv_head, first=first, size=size
        )
        if found is None:
            found = part, part_lse
            continue
        out, before = found
        both = torch.logaddexp(before, part_lse)
        # Of a row that has seen nothing yet the difference is NaN.
        weight = (part_lse - both).exp_().nan_to_num_(nan=0.0)
        found = torch.lerp(out, part, weight[..., None]), both
    assert found is not None
    return found


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
    """`_attend_tiles` for one step."""
    offsets = torch.arange(first, first + size, device=q.device)
    keys = blocks.clamp(min=0)[..., None] * size + offsets + (kv_head * k.shape[1])[:, None, None]
    k_tiles, v_tiles = (
        x.flatten(0, 1).index_select(0, keys.flatten()).view(len(q), 1, -1, x.shape[2])
        for x in (k, v)
    )
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    hidden = q.new_zeros(len(q), 1, q.shape[2], blocks.shape[1])
    hidden.masked_fill_(first_row[:, None, None] > rows, hidden_score(q.dtype))
    return attend_with_lse(q, k_tiles, v_tiles, hidden.repeat_interleave(size, dim=-1), scale=1.0)
