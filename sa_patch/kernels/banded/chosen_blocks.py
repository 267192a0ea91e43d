"""Attention over chosen blocks in pure torch, alone or as a part of a union: MoBA and BlockTopK.

Two ways lead over the chosen blocks: small ones on a CPU are read where they lie (`small_blocks`);
in all other cases the queries are grouped by the block they chose (`queries_by_block`).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sa_patch.kernels.banded import choices
from sa_patch.kernels.banded.choices import choose, first_token, parts_of_queries
from sa_patch.kernels.banded.queries_by_block import attend_queries_by_block, attend_tiles
from sa_patch.kernels.banded.shared_blocks import attend_shared_blocks
from sa_patch.kernels.banded.small_blocks import attend_small_blocks
from sa_patch.kernels.local_window import LocalWindow
from sa_patch.kernels.merge import hidden_score, merge
from sa_patch.kernels.tiling import needs_gradients, queries_at_once
from sa_patch.patterns.base import Rule
from sa_patch.patterns.block_topk import BlockTopK
from sa_patch.patterns.moba import MoBA

# Rows of a tile of queries against their own block.
_OWN_TILE = 64
# Larger blocks pay for their way into tiles: on one core 64 was the first that did.
_LARGEST_LEAF = 32
# Pairs of a query and a key of which a rule is asked at once.
_ASKED = 1 << 20


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
        inputs = q_groups[row, head], k[row, head, None], v[row, head, None]
        part = _attend_kv_head(pattern, *inputs, start=start, scale=scale)
        if out is None:
            parts.append(part)
        else:
            out[row, head] = part
    return (torch.cat(parts) if out is None else out).reshape(q.shape)


def _attend_kv_head(
    pattern: MoBA, q: Tensor, k: Tensor, v: Tensor, *, start: int, scale: float
) -> Tensor:
    """One KV head: q ``[group, nq, head_dim]``, k and v ``[1, n, head_dim]``."""
    picks = choose(pattern, q, k, start)
    wide, k_wide, v_wide = _widened(q, k, v, scale)
    blocks = _cut(k_wide[0], v_wide[0], pattern.block_size)
    own = _own_blocks(wide, *blocks, start)
    if not _by_small_blocks(pattern, q, k, v):
        return attend_queries_by_block(*own, wide, *blocks, picks)[0].to(q.dtype)
    size = pattern.block_size
    chosen = attend_small_blocks(wide, k_wide, v_wide, picks, first=0, size=size, start=start)
    return merge([own, chosen]).to(q.dtype)


def attend_chosen(
    pattern: MoBA | BlockTopK,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    scale: float,
    unless: Rule | None = None,
    beside: LocalWindow | None = None,
    picks: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the chosen blocks alone, of queries at ``start .. start + nq - 1``.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``; rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``, ``n = start + nq``.
        unless: names keys of chosen blocks that are hidden all the same. For a batch of rows that
            differ in what is hidden, call this for each.
        beside: the same, for what a local window shows, in place of a rule.
        picks: int64 ``[batch, q_heads, nq, m]``, of `choose`, where they are known already.
        softcap: of `Softmax`.

    Returns:
        Output ``[batch, q_heads, nq, head_dim]``, finite, and the log-sum-exp of the scores
        ``[batch, q_heads, nq]``, -inf where nothing is seen: both in fp32 at least, differentiable,
        and in memory O(n).
    """
    outs, sums = [], []
    hidden = unless if beside is None else beside.sees
    tiled = pattern.shared_queries > 1 and picks is None and unless is None and softcap is None
    for row in range(len(q)):
        if tiled and isinstance(pattern, BlockTopK) and not needs_gradients(q, k, v):
            out, lse = _shared_of_row(pattern, q[row], k[row], v[row], start, scale, beside)
            outs.append(out)
            sums.append(lse)
            continue
        found = []
        for own, low, end in parts_of_queries([pattern], q[row], start):
            inputs = q[row, :, own], k[row, :, :end], v[row, :, :end]
            chosen = choose(pattern, *inputs[:2], low) if picks is None else picks[row, :, own]
            found.append(_chosen_of_row(pattern, *inputs, chosen, low, scale, hidden, softcap))
        outs.append(torch.cat([out for out, _ in found], dim=1))
        sums.append(torch.cat([lse for _, lse in found], dim=1))
    return torch.stack(outs), torch.stack(sums)


def _by_small_blocks(pattern: MoBA | BlockTopK, q: Tensor, k: Tensor, v: Tensor) -> bool:
    on_cpu = q.device.type == "cpu" and not needs_gradients(q, k, v)
    return on_cpu and pattern.block_size <= _LARGEST_LEAF


def _widened(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """In fp32 at least, the keys scaled.

    Products of half precision would be rounded between the steps, which fused kernels do not do.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide), k.to(wide) * scale, v.to(wide)


def _cut(k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """One head's keys and values ``[n, head_dim]`` in blocks ``[blocks, size, head_dim]``."""
    pad = (0, 0, 0, -len(k) % size)
    k_blocks, v_blocks = (torch.nn.functional.pad(x, pad).unflatten(0, (-1, size)) for x in (k, v))
    return k_blocks, v_blocks


def _chosen_of_row(
    pattern: MoBA | BlockTopK,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    picks: Tensor,
    start: int,
    scale: float,
    unless: Rule | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`attend_chosen` for one row."""
    first, size = first_token(pattern), pattern.block_size
    wide, k_wide, v_wide = _widened(q, k, v, scale)
    if softcap is None and _by_small_blocks(pattern, q, k, v):
        blocks = {"first": first, "size": size, "start": start}
        return attend_small_blocks(wide, k_wide, v_wide, picks, **blocks, unless=unless)
    if not picks.shape[2] or k.shape[1] < first + size:
        return torch.zeros_like(wide), wide.new_full(wide.shape[:2], -torch.inf)
    hidden = None if unless is None else _hidden(picks, unless, first, size, start)
    nothing = hidden_score(wide.dtype)
    outs, sums = [], []
    for head, group in enumerate(wide.unflatten(0, (len(k), -1))):
        mine = slice(head * len(group), (head + 1) * len(group))
        out, lse = attend_queries_by_block(
            torch.zeros_like(group),
            group.new_full(group.shape[:2], nothing),
            group,
            *_cut(k_wide[head, first:], v_wide[head, first:], size),
            picks[mine],
            None if hidden is None else hidden[mine],
            softcap,
        )
        outs.append(out)
        sums.append(lse)
    lse = torch.cat(sums)
    return torch.cat(outs), lse.masked_fill(lse < nothing / 2, -torch.inf)


def _shared_of_row(
    pattern: BlockTopK,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    scale: float,
    beside: LocalWindow | None,
) -> tuple[Tensor, Tensor]:
    """`attend_chosen` for one row whose tiles of queries share their choices, part by part."""
    wide, k_wide, v_wide = _widened(q, k, v, scale)
    shared, choosers = pattern.shared, len(k) if pattern.grouped else len(q)
    blocks: Any = {"shared": shared, "first": pattern.sinks, "size": pattern.block_size}
    step = queries_at_once(choosers * pattern.most_picks(k.shape[1]), choices.CHOSEN, shared)
    outs, sums = [], []
    for low in range(0, q.shape[1], step):
        part, first = slice(low, low + step), start + low
        own = pattern.own_choices(q[:, part], k, range(first, first + q[:, part].shape[1]))
        inputs = own, wide[:, part], k_wide, v_wide
        out, lse = attend_shared_blocks(*inputs, **blocks, start=first, beside=beside)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, dim=1), torch.cat(sums, dim=1)


def _hidden(picks: Tensor, unless: Rule, first: int, size: int, start: int) -> Tensor:
    """Keys of chosen blocks that a rule names: bool ``[q_heads, nq, m, size]``."""
    heads, queries, width = picks.shape
    offsets = torch.arange(size, device=picks.device)
    positions = torch.arange(start, start + queries, device=picks.device)[None, :, None]
    step = max(1, _ASKED // (heads * width * size))
    parts = []
    for low in range(0, queries, step):
        part = slice(low, low + step)
        tokens = picks[:, part, :, None].clamp(min=0) * size + offsets + first
        named = unless(positions[:, part], tokens.flatten(2))
        parts.append(named.expand(heads, -1, -1).unflatten(2, (width, size)))
    return torch.cat(parts, dim=1)


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
        out, lse = attend_tiles(
            tiles, k_blocks[first:, :high], v_blocks[first:, :high], bias.repeat(len(q), 1)
        )
        outs.append(out.unflatten(1, (len(q), -1)))
        sums.append(lse.unflatten(1, (len(q), -1)))
    out = torch.cat(outs, dim=2)
    outs.clear()
    out = out.transpose(0, 1).flatten(1, 2)
    lse = torch.cat(sums, dim=2).transpose(0, 1).flatten(1, 2)
    return out[:, real], lse[:, real]
