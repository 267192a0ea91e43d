"""MoBA in pure torch: queries grouped by the block they chose, partial results merged.

Every piece has a fixed size, whatever the queries chose: the sums of a matrix product may round
differently in another shape, and no query may feel what later tokens made others choose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.kernels.rows import needs_gradients
from sa_patch.patterns.moba import MoBA, block_means

# Rows of a tile of queries against their own block.
_OWN_TILE = 64
# Scores of one call: few enough to stay in the caches. Measured on two cores, as the tiles below.
_SCORES = 1 << 18
# Scores of the choice that are held at once.
_RANKED = 1 << 22


def attend_blocks(
    pattern: MoBA, q: Tensor, k: Tensor, v: Tensor, *, start: int, scale: float
) -> Tensor:
    """Attention of queries at ``start .. start + nq - 1`` over own and chosen blocks.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``; rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``, ``n = start + nq``.

    Returns:
        ``[batch, q_heads, nq, head_dim]``. Memory O(n): a few copies of one KV head's queries.
    """
    batch, kv_heads = k.shape[:2]
    q_groups = q.unflatten(1, (kv_heads, -1))
    # In place, so that no second copy of the output is held; autograd would copy it each time.
    out = None if needs_gradients(q, k, v) else q_groups.new_empty(q_groups.shape)
    parts = []
    for row, head in itertools.product(range(batch), range(kv_heads)):
        inputs = q_groups[row, head], k[row, head], v[row, head]
        part = _attend_kv_head(pattern, *inputs, start=start, scale=scale)
        if out is None:
            parts.append(part)
        else:
            out[row, head] = part
    return (torch.cat(parts) if out is None else out).reshape(q.shape)


def _attend_kv_head(
    pattern: MoBA, q: Tensor, k: Tensor, v: Tensor, *, start: int, scale: float
) -> Tensor:
    """One KV head: q ``[group, nq, head_dim]``, k and v ``[n, head_dim]``."""
    size = pattern.block_size
    # Half precision is widened: its products would be rounded between the steps, which fused
    # kernels do not do.
    wide = torch.promote_types(q.dtype, torch.float32)
    pad = (0, 0, 0, -len(k) % size)
    k_blocks, v_blocks = (
        torch.nn.functional.pad(x, pad).unflatten(0, (-1, size))
        for x in (k.to(wide) * scale, v.to(wide))
    )
    q_wide = q.to(wide)
    out, lse = _own_blocks(q_wide, k_blocks, v_blocks, start)
    picks = _picks(pattern, q, block_means(k, size), start)
    for chosen in picks.unbind(-1):
        part, part_lse = _chosen_blocks(q_wide, k_blocks, v_blocks, chosen)
        lse = torch.logaddexp(lse, part_lse)
        out = torch.lerp(out, part, (part_lse - lse).exp()[..., None])
    return out.to(q.dtype)


def _picks(pattern: MoBA, q: Tensor, means: Tensor, start: int) -> Tensor:
    """Chosen blocks: int64 ``[group, nq, topk - 1 or fewer]``, -1 for none."""
    own = torch.arange(start, start + q.shape[1], device=q.device) // pattern.block_size
    step = max(1, _RANKED // max(1, len(q) * len(means)))
    return torch.cat(
        [
            pattern.rank_blocks(q[:, low : low + step], means[None], own[low : low + step])
            for low in range(0, q.shape[1], step)
        ],
        dim=1,
    )


def _own_blocks(q: Tensor, k_blocks: Tensor, v_blocks: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Causal attention within blocks: output ``[group, nq, head_dim]`` and log-sum-exp."""
    size = k_blocks.shape[1]
    first = start // size
    lead = start - first * size
    real = slice(lead, lead + q.shape[1])
    tail = (len(k_blocks) - first) * size - real.stop
    if lead or tail:
        q = torch.nn.functional.pad(q, (0, 0, lead, tail))
    q_blocks = q.unflatten(1, (-1, size)).transpose(0, 1)
    outs, sums = [], []
    for low in range(0, size, _OWN_TILE):
        high = min(low + _OWN_TILE, size)
        rows, keys = torch.arange(low, high, device=q.device), torch.arange(high, device=q.device)
        bias = torch.zeros(high - low, high, dtype=q.dtype, device=q.device)
        bias.masked_fill_(keys > rows[:, None], -torch.inf)
        tiles = q_blocks[:, :, low:high].flatten(1, 2)
        out, lse = _attend_tiles(
            tiles, k_blocks[first:, :high], v_blocks[first:, :high], bias.repeat(len(q), 1)
        )
        outs.append(out.unflatten(1, (len(q), -1)))
        sums.append(lse.unflatten(1, (len(q), -1)))
    out = torch.cat(outs, dim=2)
    outs.clear()
    out = out.transpose(0, 1).flatten(1, 2)
    lse = torch.cat(sums, dim=2).transpose(0, 1).flatten(1, 2)
    return out[:, real], lse[:, real]


def _chosen_blocks(
    q: Tensor, k_blocks: Tensor, v_blocks: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of every query over one chosen block: ``chosen [group, nq]``, -1 for none.

    Returns:
        Output ``[group, nq, head_dim]`` and its log-sum-exp, -inf where no block was chosen.
    """
    plan = _plan_tiles(chosen.flatten(), *k_blocks.shape[:2], group=len(q))
    if not len(plan.blocks):
        return torch.zeros_like(q), q.new_full(chosen.shape, -torch.inf)
    q_rows = q.flatten(0, 1)
    in_place = not needs_gradients(q, k_blocks, v_blocks)
    joined = q.new_empty(len(plan.queries) if in_place else 0, q.shape[2])
    outs, sums = [], []
    for low in range(0, len(plan.blocks), plan.per_call):
        own = plan.blocks[low : low + plan.per_call]
        places = slice(low * plan.tile, (low + plan.per_call) * plan.tile)
        tiles = q_rows[plan.queries[places]].unflatten(0, (-1, plan.tile))
        out, lse = _attend_tiles(tiles, k_blocks[own], v_blocks[own])
        sums.append(lse.flatten())
        if in_place:
            joined[places] = out.flatten(0, 1)
        else:
            outs.append(out.flatten(0, 1))
    out = (joined if in_place else torch.cat(outs))[plan.places].view_as(q)
    lse = torch.cat(sums)[plan.places].masked_fill(chosen.flatten() < 0, -torch.inf)
    return out, lse.view_as(chosen)


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
    tile = _chosen_tile(group * size)
    takers = chosen.sort(stable=True)
    counts = torch.bincount(chosen + 1, minlength=blocks + 1)
    tiles = (counts[1:] + tile - 1) // tile
    # A query's row: its block's first tile, and its place among the takers.
    first_taker, first_tile = counts.cumsum(0) - counts, tiles.cumsum(0) - tiles
    place = torch.arange(len(chosen), device=chosen.device) - first_taker[takers.values + 1]
    row = first_tile[takers.values.clamp(min=0)] * tile + place
    places = torch.empty_like(chosen)
    places.scatter_(0, takers.indices, torch.where(takers.values < 0, 0, row))
    # Every call has as many tiles as the next; a bound on all there can be suits short sequences.
    per_call = max(1, min(_SCORES // (tile * size), len(chosen) // tile + blocks))
    used = int(tiles.sum())
    total = -(-used // per_call) * per_call
    queries, of_tiles = chosen.new_zeros(total * tile), chosen.new_zeros(total)
    has_block = chosen >= 0
    queries[places[has_block]] = has_block.nonzero().squeeze(1)
    of_tiles[:used] = torch.arange(blocks, device=chosen.device).repeat_interleave(tiles)
    return _TilePlan(tile, per_call, of_tiles, queries, places)


def _chosen_tile(takers: int) -> int:
    """Rows of a tile, given how many queries choose a block on average.

    A block is copied for each of its tiles, and its last tile is padded: on average an eighth.
    """
    return min(256, max(32, 1 << ((takers // 4) | 1).bit_length() - 1))


def _attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of tiles: q ``[tiles, rows, head_dim]``, k, v ``[tiles, keys, head_dim]``.

    Returns:
        Output like q and the log-sum-exp of its scores ``[tiles, rows]``.
    """
    outs, sums = [], []
    step = max(1, _SCORES // (q.shape[1] * k.shape[1]))
    for low in range(0, len(q), step):
        piece = slice(low, low + step)
        scores = q[piece] @ k[piece].transpose(1, 2)
        if bias is not None:
            scores = scores + bias
        weights = scores.softmax(-1)
        outs.append(weights @ v[piece])
        # The largest weight is exp(largest score - log-sum-exp): far cheaper than logsumexp.
        sums.append(scores.amax(-1) - weights.amax(-1).log())
    return torch.cat(outs), torch.cat(sums)
