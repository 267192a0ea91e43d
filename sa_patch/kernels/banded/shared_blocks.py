"""Attention over blocks that a tile of queries shares: matrices of queries and keys, no sorting.

A tile's blocks stand in the order in which they were chosen, and are taken so many at a time: what
a query sums up has one shape and one order, whatever later queries chose. Tiles with about as many
blocks go together, few enough to stay in the caches from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    queries, head_dim = q.shape[1:]
    blocks, first_row, counts = tile_choices(own_choices, shared)
    choosers, tiles, _ = blocks.shape
    heads = len(q) // choosers
    counts, order = counts.flatten().sort(descending=True, stable=True)
    at_once = max(1, _ROWS // (heads * shared + _STEP_KEYS))
    most = counts[::at_once].tolist()
    # Whole steps for every tile; what is left over comes after the last row.
    per_step = max(1, _STEP_KEYS // size)
    room = -(-most[0] // per_step) * per_step - blocks.shape[2]
    first_row = pad(first_row.masked_fill(blocks < 0, shared), (0, room), value=shared)
    whole = max(0, k.shape[1] - first) // size
    kv_heads = torch.arange(choosers, device=q.device) * len(k) // choosers
    places = pad(blocks.clamp(min=0), (0, room)) + (kv_heads * whole)[:, None, None]
    places, first_row = places.flatten(0, 1), first_row.flatten(0, 1)
    keys, values = (_by_blocks(x, first, whole, size) for x in (k, v))
    q_rows = pad(q, (0, 0, 0, tiles * shared - queries)).reshape(len(q) * tiles, -1)
    out = torch.zeros_like(q_rows)
    lse = q.new_full((len(q) * tiles, shared), -torch.inf)
    for count, members in zip(most, order.split(at_once), strict=True):
        if not count:
            break
        rows = (members // tiles * heads)[:, None] + torch.arange(heads, device=q.device)
        rows = (rows * tiles + (members % tiles)[:, None]).flatten()
        own = slice(0, -(-count // per_step) * per_step)
        found = _attend_tiles(
            q_rows.index_select(0, rows).view(len(members), heads, shared, head_dim),
            keys,
            values,
            places[members, own].split(per_step, dim=1),
            first_row[members, own].split(per_step, dim=1),
        )
        out[rows], lse[rows] = (x.flatten(0, 1).flatten(1) for x in found)
    out, lse = out.view(len(q), tiles * shared, head_dim), lse.view(len(q), -1)
    return out[:, :queries], lse[:, :queries]


def _by_blocks(x: Tensor, first: int, whole: int, size: int) -> Tensor:
    """Keys or values ``[kv_heads, n, head_dim]`` as a row for each block, all heads' in turn."""
    return x[:, first : first + whole * size].reshape(len(x) * whole, size * x.shape[2])


def _attend_tiles(
    q: Tensor, keys: Tensor, values: Tensor, places: Sequence[Tensor], first_row: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention of tiles over their blocks.

    Args:
        q: ``[tiles, heads, shared, head_dim]``.
        keys, values: of `_by_blocks`.
        places, first_row: for each step ``[tiles, m]``: a block's row, and the first query of the
            tile that sees it.

    Returns:
        Output like q, finite, and its log-sum-exp, -inf where nothing is seen.
    """
    found: tuple[Tensor, Tensor] | None = None
    for step_places, step_rows in zip(places, first_row, strict=True):
        part, part_lse = _attend_step(q, keys, values, step_places, step_rows)
        if found is None:
            found = part, part_lse
            continue
        out, before = found
        both = torch.logaddexp(before, part_lse)
        # Of a row that has seen nothing yet the difference is NaN.
        weight = (part_lse - both).exp_().nan_to_num_(nan=0.0)
        found = out.lerp_(part, weight[..., None]), both
    assert found is not None
    return found


def _attend_step(
    q: Tensor, keys: Tensor, values: Tensor, places: Tensor, first_row: Tensor
) -> tuple[Tensor, Tensor]:
    """`_attend_tiles` for one step."""
    (tiles, blocks), head_dim = places.shape, q.shape[3]
    k, v = (
        x.index_select(0, places.flatten()).view(tiles, 1, -1, head_dim) for x in (keys, values)
    )
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    bias = (first_row[:, None, None] > rows).to(q.dtype).mul_(hidden_score(q.dtype))
    bias = bias[..., None].expand(-1, -1, -1, -1, k.shape[2] // blocks).flatten(3)
    return attend_with_lse(q, k, v, bias, scale=1.0)
