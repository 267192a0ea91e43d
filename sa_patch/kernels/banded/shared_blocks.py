"""Attention over blocks that a tile of queries shares: matrices of queries and keys, no sorting.

A tile's blocks stand in the order in which they were chosen, and are taken so many at a time: what
a query sums up has one shape and one order, whatever later queries chose. Tiles with about as many
blocks go together, few enough to stay in the caches from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.kernels.local_window import LocalWindow
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
    start: int = 0,
    beside: LocalWindow | None = None,
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
        start: the first query's position.
        beside: what another part shows, and these blocks therefore do not.

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
    rows_of_tile = torch.arange(shared, device=q.device)
    out = torch.zeros_like(q_rows)
    lse = q.new_full((len(q) * tiles, shared), -torch.inf)
    for count, members in zip(most, order.split(at_once), strict=True):
        if not count:
            break
        rows = (members // tiles * heads)[:, None] + torch.arange(heads, device=q.device)
        rows = (rows * tiles + (members % tiles)[:, None]).flatten()
        own = slice(0, -(-count // per_step) * per_step)
        steps = places[members, own].split(per_step, 1), first_row[members, own].split(per_step, 1)
        positions = (start + members % tiles * shared)[:, None] + rows_of_tile
        found = _attend_tiles(
            q_rows.index_select(0, rows).view(len(members), heads, shared, head_dim),
            keys,
            values,
            (
                (step, _bias(q, step_rows, step % whole, positions, first, size, beside))
                for step, step_rows in zip(*steps, strict=True)
            ),
        )
        out[rows], lse[rows] = (x.flatten(0, 1).flatten(1) for x in found)
    out, lse = out.view(len(q), tiles * shared, head_dim), lse.view(len(q), -1)
    return out[:, :queries], lse[:, :queries]


def _by_blocks(x: Tensor, first: int, whole: int, size: int) -> Tensor:
    """Keys or values ``[kv_heads, n, head_dim]`` as a row for each block, all heads' in turn."""
    return x[:, first : first + whole * size].reshape(len(x) * whole, size * x.shape[2])


def _attend_tiles(
    q: Tensor, keys: Tensor, values: Tensor, steps: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Attention of tiles over their blocks.

    Args:
        q: ``[tiles, heads, shared, head_dim]``.
        keys, values: of `_by_blocks`.
        steps: each the rows of blocks ``[tiles, m]``, and its `_bias`.

    Returns:
        Output like q, finite, and its log-sum-exp, -inf where nothing is seen.
    """
    found: tuple[Tensor, Tensor] | None = None
    for places, bias in steps:
        k, v = (
            x.index_select(0, places.flatten()).view(len(q), 1, -1, q.shape[3])
            for x in (keys, values)
        )
        part, part_lse = attend_with_lse(q, k, v, bias, scale=1.0)
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


def _bias(
    like: Tensor,
    first_row: Tensor,
    blocks: Tensor,
    positions: Tensor,
    first: int,
    size: int,
    beside: LocalWindow | None,
) -> Tensor:
    """What is added to the scores of tiles, for the keys of some of their blocks.

    Args:
        first_row: ``[tiles, m]``, the first query of the tile that sees each block.
        blocks: ``[tiles, m]``, their numbers.
        positions: ``[tiles, shared]``, of the queries.

    Returns:
        ``[tiles, 1, shared, m * size]``.
    """
    rows = torch.arange(positions.shape[1], device=like.device)
    unseen = first_row[:, None] > rows[:, None]
    if beside is not None:
        tokens = (blocks * size + first)[..., None] + torch.arange(size, device=like.device)
        shown = beside.sees(positions[..., None], tokens.flatten(1)[:, None])
        unseen = unseen[..., None] | shown.unflatten(2, (-1, size))
    bias = unseen.to(like.dtype).mul_(hidden_score(like.dtype))
    if beside is None:
        bias = bias[..., None].expand(*bias.shape, size)
    return bias.flatten(2)[:, None]
