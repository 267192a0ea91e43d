"""A pattern as calls of FlexAttention over disjoint sets of keys, merged by log-sum-exp.

Whatever has a place in the original order is one call: sinks, windows, neighbourhoods and chosen
blocks. Every ring (stochastic attention, prefix-stable or not) is another, its rows ordered by
their points so that it is a band. A ring leaves out sinks, window and the rings before it; chosen
blocks leave out all rings. So a pattern without a ring, and a ring alone, need no merging.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sa_patch.kernels.flex import kernel as flex_kernel
from sa_patch.kernels.flex import log_sum_exp as flex_lse
from sa_patch.kernels.flex.blocks import BlockLists, listed, window_blocks
from sa_patch.kernels.flex.chosen_blocks import chosen_starts, content_blocks, first_near
from sa_patch.kernels.flex.kernel import Call, Chosen
from sa_patch.kernels.flex.rings import ring_plan
from sa_patch.kernels.flex.tables import Tables, absent_keys, near, numbers, plans, table
from sa_patch.kernels.merge import merge
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, parts_of

_Fixed = tuple[int, int]
"""(sinks, window): the first and the nearest keys in view"""
_Piece = Callable[..., Any]
"""``piece(q, k, v, lse=)``: the output. With `lse` also the log-sum-exp on GPUs, while on CPUs the
keys are given the sentinel."""


def attend_rows(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float
) -> Tensor:
    """Whole rows of one length, or of any where the pattern is prefix-stable.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
    """
    if q.shape[2] == 1:
        # One token sees itself.
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    disjoint_parts = _disjoint_parts(pattern, q, k, layer=layer, scale=scale)
    if len(disjoint_parts) == 1:
        out: Tensor = disjoint_parts[0](q, k, v, lse=False)
        return out
    if q.device.type != "cpu":
        return merge([piece(q, k, v, lse=True) for piece in disjoint_parts])
    wide = (q.float(), k.float(), v.float())
    parts = [flex_lse.measured(partial(piece, lse=True), *wide, scale) for piece in disjoint_parts]
    return merge(parts).to(q.dtype)


def _disjoint_parts(
    pattern: Pattern, q: Tensor, k: Tensor, *, layer: int, scale: float
) -> list[_Piece]:
    parts = parts_of(pattern)
    rings = tuple(part for part in parts if isinstance(part, (SA, PSA)))
    content = tuple(part for part in parts if isinstance(part, (MoBA, BlockTopK)))
    fixed = _fixed(parts, q.shape[2])
    disjoint_parts: list[_Piece] = []
    if content:
        disjoint_parts.append(_content_part(content, fixed, rings, q, k, layer, scale))
    elif any(fixed):
        disjoint_parts.append(partial(_window_part, fixed, scale))
    for place, ring in enumerate(rings):
        disjoint_parts.append(partial(_ring_part, ring, fixed, rings[:place], layer, scale))
    return disjoint_parts


def _fixed(parts: tuple[Pattern, ...], seq_len: int) -> _Fixed:
    if any(isinstance(part, Full) for part in parts):
        return 0, seq_len
    windows = [part.window for part in parts if isinstance(part, SWA)]
    sinks = [part.size for part in parts if isinstance(part, Sinks)]
    sinks += [part.sinks for part in parts if isinstance(part, BlockTopK)]
    return max(sinks, default=0), max(windows, default=0)


def _window_part(fixed: _Fixed, scale: float, q: Tensor, k: Tensor, v: Tensor, *, lse: bool) -> Any:
    (sinks, window), seq_len, device = fixed, q.shape[2], q.device

    def lists() -> BlockLists:
        # A row must list its own block, be it for the sinks in it.
        block = flex_kernel.block_size(device)
        return window_blocks(seq_len, max(1, window), block, sinks).to(device)

    name = ("window", seq_len, fixed, device)
    k, v, call = _call(name, lists, k, v, scale, lse)
    return flex_kernel.window(q, k, v, call, *numbers("fixed", fixed, device))


def _ring_part(
    ring: SA | PSA,
    fixed: _Fixed,
    others: tuple[SA | PSA, ...],
    layer: int,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lse: bool,
) -> Any:
    """Rows permuted to the order of their points, attended to as a band, and put back."""
    plan = ring_plan(ring, others, q.shape[2], layer, q.shape[1], q.device)
    k, v, call = _call(
        plan.lists_name, lambda: plan.lists, _take(k, plan.keys), _take(v, plan.keys), scale, lse
    )
    result = flex_kernel.ring(
        _take(q, plan.queries),
        k,
        v,
        call,
        plan.tables,
        plan.positions,
        plan.reach,
        numbers("fixed", fixed, q.device),
        plan.others,
    )
    if not call.lse:
        return _take(result, plan.places)
    out, total = result
    return _take(out, plan.places), _take(total[..., None], plan.places)[..., 0]


def _content_part(
    parts: tuple[MoBA | BlockTopK, ...],
    fixed: _Fixed,
    others: tuple[SA | PSA, ...],
    q: Tensor,
    k: Tensor,
    layer: int,
    scale: float,
) -> _Piece:
    """Blocks are chosen once, by the queries and keys as they are given here."""
    (heads, seq_len), device, block = q.shape[1:3], q.device, flex_kernel.block_size(q.device)
    tables, positions = Tables(device), torch.arange(seq_len, device=device)
    first = torch.stack([first_near(part, positions) for part in parts]).amin(0)
    tables.add_by_position(first[None])
    keys = torch.arange(seq_len + absent_keys(seq_len, block), device=device)
    for other in others:
        of_other = other.ring(seq_len, layer, heads, device)
        tables.add_local_window(of_other, positions[None], keys[None])
    with torch.no_grad():
        starts = [chosen_starts(part, q, k) for part in parts]
        sizes = [part.block_size for part in parts]
        chosen = [pair for pair in zip(starts, sizes, strict=True) if pair[0].shape[2]]
        seen_from = torch.minimum(first, positions - fixed[1] + 1).clamp(min=0)
        lists = content_blocks(seen_from, fixed[0], chosen, block)
    choices = tuple(_choice(tables, *choice, index) for index, choice in enumerate(chosen))
    joined, *rest = tables.joined()
    noted = iter(rest)
    of_first, within = table(noted), tuple(near(noted) for _ in others)

    def run(q: Tensor, k: Tensor, v: Tensor, *, lse: bool) -> Any:
        k, v, call = _call(None, lambda: lists, k, v, scale, lse)
        fixed_numbers = numbers("fixed", fixed, device)
        return flex_kernel.content(q, k, v, call, joined, fixed_numbers, of_first, choices, within)

    return run


def _choice(tables: Tables, starts: Tensor, size: int, index: int) -> Chosen:
    """Adds ``starts [batch, q_heads, picks, n]`` to the tables."""
    _, heads, picks, seq_len = starts.shape
    halves = [seq_len << bit for bit in reversed(range(picks.bit_length() - 1))]
    begin, row, head, width, *steps = numbers(
        ("choice", index),
        (tables.add(starts), heads * picks * seq_len, picks * seq_len, size, *halves),
        starts.device,
    )
    return Chosen(begin, row, head, tuple(steps), width)


def _call(
    name: Hashable,
    build: Callable[[], BlockLists],
    k: Tensor,
    v: Tensor,
    scale: float,
    lse: bool,
) -> tuple[Tensor, Tensor, Call]:
    """Keys and values with the sentinel where it is needed, and what every mask is called with.

    Args:
        name: of the lists in the cache; None to keep them out of it.
    """
    sentinel = lse and k.device.type == "cpu"
    index = flex_lse.sentinel_index(k.shape[2], flex_kernel.block_size(k.device))

    def ready() -> tuple[Tensor, ...]:
        lists = build()
        if sentinel:
            lists = lists.with_block(index // flex_kernel.block_size(k.device))
        if lists.full_counts is None or lists.full_blocks is None:
            return listed(lists.counts, lists.blocks, lists.columns)
        width = max(lists.blocks.shape[-1], lists.full_blocks.shape[-1])
        return (
            *listed(lists.counts, lists.blocks, lists.columns, width),
            *listed(lists.full_counts, lists.full_blocks, lists.columns, width),
        )

    lists = ready() if name is None else plans.get(("lists", sentinel, name), ready)
    if not sentinel:
        return k, v, Call(lists, scale, lse=lse)
    k, v = flex_lse.with_sentinel(k, v, index)
    return k, v, Call(lists, scale, sentinel=numbers("sentinel", (index,), k.device)[0])


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [batch, heads, n, head_dim]`` by ``index [draws, m]``.

    With a draw for every query head, KV heads are repeated to the query heads first.
    """
    if len(index) == 1:
        return x.index_select(2, index[0])
    x = x.repeat_interleave(len(index) // x.shape[1], dim=1)
    return x.gather(2, index.long()[None, :, :, None].expand(len(x), -1, -1, x.shape[3]))
