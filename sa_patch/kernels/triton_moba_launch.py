"""Launches of the Triton kernels of mixture of block attention: choose, sort, attend, merge."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.kernels.triton_configs import Launch, MobaConfig, next_power_of_2, packed_heads
from sa_patch.kernels.triton_launch import LOG2_E, Rows, shape, strides
from sa_patch.kernels.triton_moba import choose_kernel, chosen_kernel, own_kernel
from sa_patch.kernels.triton_plans import band_table, current_stream
from sa_patch.kernels.triton_softmax import INTERPRETED
from sa_patch.patterns import MoBA
from sa_patch.patterns.moba import block_means

# Picks that one sweep of the choice holds in registers.
_PICKS = 4
# Partial results held at once; KV heads are served in turns beyond.
PARTIAL_BYTES = 1 << 30


def choose_blocks(
    pattern: MoBA, q: Tensor, k: Tensor, *, rows: Rows, count: int, launch: Launch
) -> Tensor:
    """The blocks that each query chooses, in any order.

    Args:
        count: blocks to choose, at most ``n // block_size``.

    Returns:
        int32 ``[batch, q_heads, nq, count]``, -1 where fewer are earlier and at padding.
    """
    picks = torch.full((*q.shape[:3], count), -1, dtype=torch.int32, device=q.device)
    means = block_means(k, pattern.block_size).contiguous()
    pack = packed_heads(q.shape[1] // k.shape[1], launch.block_m)
    slots = launch.block_m // pack
    table = band_table(rows, q.shape[2], slots, q.device, current_stream(q.device))
    if len(table) and count:
        choose_kernel[(len(table) * (q.shape[1] // pack),)](
            q,
            means,
            picks,
            table,
            q.shape[2],
            pattern.block_size,
            means.shape[2],
            count,
            *strides(q),
            PACK=pack,
            PICKS=min(_PICKS, next_power_of_2(count)),
            **shape(q, k, launch),
        )
    return picks


def attend_chosen(
    pattern: MoBA, q: Tensor, k: Tensor, v: Tensor, picks: Tensor, *, scale: float, launch: Launch
) -> tuple[Tensor, Tensor]:
    """Attention of every query over each of its picks alone.

    Returns:
        fp32 outputs ``[batch, q_heads, nq, count, head_dim]`` and their log2-sum-exp2 without the
        last dimension; nothing is written where there is no pick.
    """
    batch, heads, _, count = picks.shape
    kv_heads, blocks = k.shape[1], k.shape[2] // pattern.block_size
    groups, size = batch * kv_heads * blocks, launch.block_m
    problem = torch.arange(batch * heads, dtype=torch.int32, device=q.device)
    offset = (problem // (heads // kv_heads) * blocks).view(batch, heads, 1, 1)
    group = torch.where(picks < 0, groups, picks + offset).flatten()
    ordered, order = group.sort(stable=True)
    numbers = torch.arange(groups + 1, dtype=torch.int32, device=q.device)
    group_first = torch.searchsorted(ordered, numbers)
    tile_first = torch.zeros_like(group_first)
    torch.cumsum((group_first.diff() + size - 1) // size, 0, out=tile_first[1:])
    # Each group fills whole tiles and at most one in part: no need to ask the device how many.
    tiles = group.numel() // size + min(groups, group.numel())
    tile_numbers = torch.arange(tiles, device=q.device)
    tile_group = torch.searchsorted(tile_first[1:], tile_numbers, right=True)
    partial = torch.empty(*picks.shape, q.shape[3], dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(picks.shape, dtype=torch.float32, device=q.device)
    chosen_kernel[(tiles,)](
        q,
        k,
        v,
        partial,
        partial_lse,
        order,
        group_first,
        tile_first,
        tile_group,
        groups,
        q.shape[2],
        pattern.block_size,
        blocks,
        count,
        scale * LOG2_E,
        *strides(q, k, v),
        EVEN=pattern.block_size % launch.block_n == 0,
        WIDEN=INTERPRETED,
        **shape(q, k, launch),
    )
    return partial, partial_lse


def launch_moba(
    pattern: MoBA,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    rows: Rows,
    scale: float,
    config: MobaConfig,
) -> None:
    """Mixture of block attention of `rows`; arguments as of `launch_window`."""
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    count = min(pattern.topk - 1, k.shape[2] // pattern.block_size)
    bytes_per_kv_head = max(1, batch * group * queries * count * head_dim * 4)
    step = max(1, PARTIAL_BYTES // bytes_per_kv_head)
    for first in range(0, kv_heads, step):
        kv = slice(first, first + step)
        own = slice(first * group, (first + step) * group)
        part_lse = None if lse is None else torch.full_like(lse[:, own], -torch.inf)
        _attend_heads(
            pattern,
            q[:, own],
            k[:, kv],
            v[:, kv],
            out[:, own],
            part_lse,
            rows,
            count,
            scale,
            config,
        )
        if lse is not None and part_lse is not None:
            lse[:, own] = part_lse


def _attend_heads(
    pattern: MoBA,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    rows: Rows,
    count: int,
    scale: float,
    config: MobaConfig,
) -> None:
    picks = choose_blocks(pattern, q, k, rows=rows, count=count, launch=config.choose)
    partial: tuple[Tensor | None, Tensor | None] = (None, None)
    if count:
        partial = attend_chosen(pattern, q, k, v, picks, scale=scale, launch=config.chosen)
    pack = packed_heads(q.shape[1] // k.shape[1], config.own.block_m)
    slots = config.own.block_m // pack
    table = band_table(rows, q.shape[2], slots, q.device, current_stream(q.device))
    if not len(table):
        return
    own_kernel[(len(table) * (q.shape[1] // pack),)](
        q,
        k,
        v,
        out,
        lse,
        *partial,
        picks,
        table,
        q.shape[2],
        pattern.block_size,
        count,
        scale * LOG2_E,
        *strides(q, k, v, out),
        PACK=pack,
        WITH_LSE=lse is not None,
        WIDEN=INTERPRETED,
        **shape(q, k, config.own),
    )
