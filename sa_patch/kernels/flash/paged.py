"""Blocks that a tile of queries shares, on FlashAttention-4's paged keys.

The queries of a tile, of all query heads that share a KV head, are a sequence whose page table
lists what the tile reads. Keys and values stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.kernels.plans.block_lists import Blocks
from sa_patch.kernels.plans.pages import PagedPlan, paged_part, paged_plan
from sa_patch.kernels.plans.plan import Pass
from sa_patch.kernels.tiling import queries_at_once
from sa_patch.patterns import BlockTopK

# The kernel loads so many numbers of 16 bits at once, and wants them aligned.
_ALIGNED = 8
# Choices of queries held at once.
CHOICES = 1 << 26
# Of a tile's 128 rows so many have to be filled.
_LEAST_ROWS = 64

PagedKernel = Callable[..., tuple[Tensor, Tensor]]
"""``(q, k, v, page_table, plan, group)`` to output and natural log-sum-exp: q ``[sequences, 1,
rows, head_dim]``, in which the rows of `group` query heads follow each other, k and v ``[pages,
page, 1, head_dim]``, and int32 ``[sequences, width]``, the pages of each sequence."""


def part_by_pages(
    given: Pass, group: int, queries: int, keys: int, blocks: Blocks
) -> BlockTopK | None:
    """The part of a pass whose choices tiles share by pages; None where a pass is walked by lists.

    Args:
        group: query heads that share a KV head.
        queries, keys: of a row of the batch.
        blocks: rows and keys that the kernel takes at once.
    """
    part = paged_part(given, queries, keys)
    if part is None or not (part.grouped or group == 1):
        return None
    fits = part.block_size < blocks.keys and part.shared * group >= _LEAST_ROWS
    return part if fits else None


def attend_pages(
    given: Pass,
    part: BlockTopK,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    kernel: PagedKernel,
) -> tuple[Tensor, Tensor]:
    """A pass of `part_by_pages`: shapes as `attend_plans`, and the log-sum-exp of its scores.

    Choices that grow with the position are made for some queries at a time.
    """
    (batch, _, count, _), (kv_heads, seq_len) = q.shape, k.shape[1:3]
    of_a_query = batch * kv_heads * part.most_picks(seq_len)
    # The keys of the first ones hold a page at least.
    least = -(-part.block_size // part.shared) * part.shared
    step = max(least, queries_at_once(of_a_query, CHOICES, part.shared))
    outs, sums = [], []
    for first in range(0, count, step):
        own = slice(first, min(first + step, count))
        known = slice(seq_len - count + own.stop)
        tensors = q[:, :, own], k[:, :, known], v[:, :, known]
        plan = paged_plan(given.local, part, *tensors[:2], step=blocks.keys)
        out, lse = _read_pages(plan, *tensors, kernel)
        outs.append(out)
        sums.append(lse)
    return (outs[0], sums[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(sums, 2))


def _read_pages(
    plan: PagedPlan, q: Tensor, k: Tensor, v: Tensor, kernel: PagedKernel
) -> tuple[Tensor, Tensor]:
    """`attend_pages` for queries whose plan is made."""
    (batch, heads, count, head_dim), kv_heads = q.shape, k.shape[1]
    tiles, group = plan.used.shape[2], heads // kv_heads
    rows = pad(q, (0, 0, 0, tiles * plan.shared - count))
    rows = rows.view(batch, kv_heads, group, tiles, plan.shared, head_dim).permute(0, 1, 3, 4, 2, 5)
    keys, values, page_table = paged_keys(k, v, plan)
    shape = (batch, kv_heads, tiles, plan.shared, group)
    out, lse = kernel(
        rows.reshape(batch * kv_heads * tiles, 1, plan.shared * group, head_dim),
        keys,
        values,
        page_table,
        plan,
        group,
    )
    out = out.view(*shape, -1).permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    lse = lse.view(shape).permute(0, 1, 4, 2, 3).flatten(3, 4).flatten(1, 2)
    return out[:, :, :count], lse[..., :count]


def paged_keys(k: Tensor, v: Tensor, plan: PagedPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as pages that begin at every multiple of what their strides share.

    Args:
        k, v: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        Views ``[pages, page, 1, head_dim]`` of both, of copies where their layouts differ or are
        not aligned, and int32 ``[batch * kv_heads * tiles, width]``, the pages of every sequence.
    """
    aligned = (*k.stride()[:3], k.storage_offset(), v.storage_offset())
    if k.stride() != v.stride() or k.stride(3) != 1 or any(x % _ALIGNED for x in aligned):
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    batch, kv_heads, seq_len, head_dim = k.shape
    of_row, of_head, of_token, _ = k.stride()
    unit = math.gcd(of_row, of_head, of_token)
    farthest = of_row * (batch - 1) + of_head * (kv_heads - 1) + of_token * (seq_len - plan.page)
    pages = farthest // unit + 1
    shape, strides = (pages, plan.page, 1, head_dim), (unit, of_token, head_dim, 1)
    pools = k.as_strided(shape, strides), v.as_strided(shape, strides)
    row, head = (torch.arange(x, dtype=torch.int32, device=k.device) for x in (batch, kv_heads))
    first = row[:, None] * (of_row // unit) + head * (of_head // unit)
    table = plan.starts * (of_token // unit) + first[:, :, None, None]
    return (*pools, table.flatten(0, 2))
