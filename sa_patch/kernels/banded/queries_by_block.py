"""Attention over chosen blocks: queries grouped by the block they chose, results merged.

Every group has a fixed size, whatever the queries chose: the sums of a matrix product may round
differently in another shape, and no query may feel what later tokens made others choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.kernels.backend import Softmax
from sa_patch.kernels.merge import hidden_score
from sa_patch.kernels.tiling import needs_gradients

# Scores of one call: few enough to stay in the caches. Measured on two cores, as the tiles below.
_SCORES = 1 << 18


def attend_queries_by_block(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    picks: Tensor,
    hidden: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Join to a result the attention of the queries of one KV head over their chosen blocks.

    Args:
        out, lse: ``[group, nq, head_dim]`` and ``[group, nq]``: output and log-sum-exp over other
            keys; `hidden_score` where there are none.
        q: ``[group, nq, head_dim]``, fp32 or fp64.
        k_blocks, v_blocks: ``[blocks, size, head_dim]``; the keys are scaled.
        picks: int64 ``[group, nq, m]``, -1 for none.
        hidden: bool ``[group, nq, m, size]``, keys of chosen blocks that are hidden all the same.
        softcap: of `Softmax`.

    Returns:
        Output and log-sum-exp over both. Differentiable.
    """
    for pick, chosen in enumerate(picks.unbind(-1)):
        unseen = None if hidden is None else hidden[:, :, pick]
        part, part_lse = _one_each(q, k_blocks, v_blocks, chosen, unseen, softcap)
        lse = torch.logaddexp(lse, part_lse)
        out = torch.lerp(out, part, (part_lse - lse).exp()[..., None])
    return out, lse


def _one_each(
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    chosen: Tensor,
    hidden: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over one chosen block: ``chosen [group, nq]``, -1 for none.

    Returns:
        Output ``[group, nq, head_dim]`` and its log-sum-exp, `hidden_score` where nothing is seen.
    """
    nothing = hidden_score(q.dtype)
    plan = _plan_tiles(chosen.flatten(), *k_blocks.shape[:2], group=len(q))
    if not len(plan.blocks):
        return torch.zeros_like(q), q.new_full(chosen.shape, nothing)
    q_rows = q.flatten(0, 1)
    hidden_rows = None if hidden is None else hidden.flatten(0, 1)
    in_place = not needs_gradients(q, k_blocks, v_blocks)
    joined = q.new_empty(len(plan.queries) if in_place else 0, q.shape[2])
    outs, sums = [], []
    for low in range(0, len(plan.blocks), plan.per_call):
        own = plan.blocks[low : low + plan.per_call]
        places = slice(low * plan.tile, (low + plan.per_call) * plan.tile)
        block_queries = plan.queries[places]
        tiles = q_rows[block_queries].unflatten(0, (-1, plan.tile))
        bias = None
        if hidden_rows is not None:
            unseen = hidden_rows[block_queries].unflatten(0, (-1, plan.tile))
            bias = torch.zeros_like(unseen, dtype=q.dtype).masked_fill_(unseen, nothing)
        out, lse = attend_tiles(tiles, k_blocks[own], v_blocks[own], bias, softcap)
        sums.append(lse.flatten())
        if in_place:
            joined[places] = out.flatten(0, 1)
        else:
            outs.append(out.flatten(0, 1))
    # What has no block took another query's result, which may be later and no number.
    none = chosen.flatten() < 0
    out = (joined if in_place else torch.cat(outs))[plan.places].masked_fill(none[:, None], 0)
    lse = torch.cat(sums)[plan.places].masked_fill(none, nothing)
    return out.view_as(q), lse.view_as(chosen)


@dataclass(frozen=True)
class _TilePlan:
    """Queries in tiles that share their block.

    Args:
        tile: rows of a tile.
        per_call: tiles of a call; their number is a multiple of it.
        blocks: int64 ``[tiles]``, the block of each.
        queries: int64 ``[tiles * tile]``, the query of each row; 0 in padding.
        places: int64 ``[queries]``, the row of each query; 0 for one that has no block.
    """

    tile: int
    per_call: int
    blocks: Tensor
    queries: Tensor
    places: Tensor


def _plan_tiles(chosen: Tensor, blocks: int, size: int, *, group: int) -> _TilePlan:
    """Group queries by their block, ``chosen [queries]``, -1 for none."""
    tile = _query_tile(group * size)
    block_queries = chosen.sort(stable=True)
    counts = torch.bincount(chosen + 1, minlength=blocks + 1)
    tiles = (counts[1:] + tile - 1) // tile
    # A query's row: its block's first tile, and its place among the queries that chose it.
    first_taker, first_tile = counts.cumsum(0) - counts, tiles.cumsum(0) - tiles
    place = torch.arange(len(chosen), device=chosen.device) - first_taker[block_queries.values + 1]
    row = first_tile[block_queries.values.clamp(min=0)] * tile + place
    places = torch.empty_like(chosen)
    places.scatter_(0, block_queries.indices, torch.where(block_queries.values < 0, 0, row))
    # Every call has as many tiles as the next; a bound on all there can be suits short sequences.
    per_call = max(1, min(_SCORES // (tile * size), len(chosen) // tile + blocks))
    used = int(tiles.sum())
    total = -(-used // per_call) * per_call
    queries, of_tiles = chosen.new_zeros(total * tile), chosen.new_zeros(total)
    has_block = chosen >= 0
    queries[places[has_block]] = has_block.nonzero().squeeze(1)
    of_tiles[:used] = torch.arange(blocks, device=chosen.device).repeat_interleave(tiles)
    return _TilePlan(tile, per_call, of_tiles, queries, places)


def _query_tile(block_queries: int) -> int:
    """Rows of a tile, given how many queries choose a block on average.

    A block is copied for each of its tiles, and its last tile is padded: on average an eighth.
    """
    return min(256, max(32, 1 << ((block_queries // 4) | 1).bit_length() - 1))


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of tiles: q ``[tiles, rows, head_dim]``, k, v ``[tiles, keys, head_dim]``.

    Args:
        bias: added to the scores, ``[rows, keys]`` or ``[tiles, rows, keys]``.
        softcap: of `Softmax`.

    Returns:
        Output like q and the log-sum-exp of its scores ``[tiles, rows]``.
    """
    outs, sums = [], []
    step = max(1, _SCORES // (q.shape[1] * k.shape[1]))
    for low in range(0, len(q), step):
        group = slice(low, low + step)
        scores = Softmax(softcap).cap(q[group] @ k[group].transpose(1, 2))
        if bias is not None:
            scores = scores + (bias if bias.dim() == 2 else bias[group])
        weights = scores.softmax(-1)
        outs.append(weights @ v[group])
        # The largest weight is exp(largest score - log-sum-exp): far cheaper than logsumexp.
        sums.append(scores.amax(-1) - weights.amax(-1).log())
    return torch.cat(outs), torch.cat(sums)
