"""From a pattern to a plan: an order of tokens, lists of key blocks, and what the mask reads.

SA alone, or PSA, has its tokens in the order of its ring, where a block of queries needs a band of
keys. All else keeps the order of positions. There a ring within a union shows every block of
queries some key of nearly every earlier block, so that such a union takes as long as full
attention: it is served as a second opinion, not for speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.kernels.flex.block_lists import Choice, InOrder, RingInOrder, block_lists
from sa_patch.kernels.local_window import LocalWindow, joined, local_window_of
from sa_patch.kernels.tensor_cache import TensorCache
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, parts_of
from sa_patch.patterns.block_selection.block_means import block_means
from sa_patch.patterns.ring import Ring

# At 128K tokens the plan of a layer takes 12 MiB on a GPU, so that all layers of a model stay.
PLANS = TensorCache(limit=512 << 20)

# Measured at n = 2048, 8 query and 2 KV heads of 64, one CPU thread, SWA w = 256 and 64 in fp32,
# milliseconds for blocks of 32, 64, 128, 256: 36, 37, 47, 61 and 14, 17, 33, 59; in bf16
# 13, 9.1, 9.0, 10.5 and 5.1, 4.4, 6.4, 8.9. On GPUs 128 is what FlexAttention's tiles divide.
_CPU_BLOCK, _GPU_BLOCK = 64, 128
# Scores of MoBA's choice that are held at once: few enough for a core's cache, and on a GPU enough
# to be worth a launch.
_SCORE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
# The circumference of an open line: so large that nothing is near the other way round.
_OPEN = 1 << 30


class Structure(NamedTuple):
    """What of a mask is compiled in."""

    ordered: bool
    """whether tokens stand in another order than that of their positions"""
    local: bool
    """whether sinks or neighbourhoods are in view"""
    rings: int
    """how many rings are read"""
    halvings: tuple[int, ...]
    """of each pattern that chooses blocks: log2 of how many a query chooses"""


class Plan(NamedTuple):
    """How a pattern is computed on sequences of one length."""

    order: Tensor
    """int64 ``[draws, n]``: the position of the token in every place"""
    places: Tensor
    """int64 ``[draws, n]``: the place of every position"""
    lists: tuple[Tensor, ...]
    """as `block_lists` gives them"""
    tables: Tensor
    """int32 ``[numbers]``: what the mask reads, as `_tables` lays it out"""
    structure: Structure
    """how the mask reads it"""


def block_size(device: torch.device) -> int:
    """Queries, and keys, of one block."""
    return _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK


def plan_of(pattern: Pattern, q: Tensor, k: Tensor, *, layer: int, block: int) -> Plan:
    """The plan of a pattern.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k: ``[batch, kv_heads, n, head_dim]``.
        block: queries, and keys, of one block.
    """
    (heads, seq_len), device, parts = q.shape[1:3], q.device, parts_of(pattern)
    drawn = [part for part in parts if isinstance(part, (SA, PSA))]
    local = joined([local_window_of(SWA(seq_len) if isinstance(p, Full) else p) for p in parts])
    choices = [
        Choice(starts, part.block_size)
        for part in parts
        if isinstance(part, (MoBA, BlockTopK))
        if (starts := chosen_starts(part, q, k)).shape[2]
    ]
    structure = Structure(
        ordered=len(drawn) == len(parts) == 1,
        local=bool(local.sinks or local.neighbourhoods),
        rings=len(drawn),
        halvings=tuple(choice.starts.shape[2].bit_length() - 1 for choice in choices),
    )

    def build() -> tuple[Tensor, ...]:
        rings = [part.ring(seq_len, layer, heads, device) for part in drawn]
        order = _ring_order(rings[0]) if structure.ordered else _ascending(seq_len, device)
        given = _in_order(order, local if structure.local else None, rings, choices)
        return order, order.argsort(dim=1), _tables(given), *block_lists(given, block)

    if choices:
        order, places, tables, *lists = build()
    else:
        # How many heads there are matters only to a pattern that draws for each.
        draws = heads if any(part.per_head for part in drawn) else 1
        key = (pattern, layer if drawn else 0, draws, seq_len, block, device)
        order, places, tables, *lists = PLANS.get(key, build)
    return Plan(order, places, tuple(lists), tables, structure)


def _ascending(seq_len: int, device: torch.device) -> Tensor:
    return torch.arange(seq_len, device=device)[None]


def _ring_order(ring: Ring) -> Tensor:
    """Neighbours on the ring side by side: int64 ``[draws, n]``, a position in every place.

    Segment by segment where reaches shrink, so that those of a block's queries differ little.
    """
    segments = [
        first + ring.points[:, first:last].argsort(dim=1, stable=True)
        for first, last in ring.segments()
    ]
    return torch.cat(segments, dim=1)


def _in_order(
    order: Tensor, local: LocalWindow | None, rings: list[Ring], choices: list[Choice]
) -> InOrder:
    in_order = []
    for ring in rings:
        draws = order.expand(max(len(order), len(ring.points)), -1)
        points = ring.points.expand(len(draws), -1).gather(1, draws)
        size = _OPEN if ring.size is None else ring.size
        in_order.append(RingInOrder(points, ring.reach[order], size))
    if local is None:
        return InOrder(order, None, 0, in_order, choices)
    return InOrder(order, local.first(order), local.sinks, in_order, choices)


def _tables(given: InOrder) -> Tensor:
    """All tables end to end, behind five numbers for each thing that the mask may read.

    These are, of a table, where it begins and how far apart its draws are (0 for a single one):

    - order, neighbourhoods; and the number of sinks;
    - of each ring points, reaches; and its size;
    - of each choice its starts; and the number of heads, n, and tokens in a block.

    One tensor holds all, because every index brings the size of its tensor into the mask, and the
    C++ template of torch 2.13 confuses the names of two sizes in a mask.
    """
    tables: list[Tensor] = []
    numbers: list[int] = []
    end = 5 * (1 + len(given.rings) + len(given.choices))

    def note(*added: Tensor) -> None:
        nonlocal end
        for table in added:
            numbers.extend((end, table.shape[1] if len(table) > 1 else 0))
            tables.append(table.flatten().int())
            end += table.numel()

    note(given.order, given.order if given.first is None else given.first)
    numbers.append(given.sinks)
    for ring in given.rings:
        note(ring.points, ring.reach)
        numbers.append(ring.size)
    for starts, size in given.choices:
        note(starts.flatten(0, 1).flatten(1))
        numbers.extend((starts.shape[1], starts.shape[3], size))

    def head() -> tuple[Tensor]:
        return (torch.tensor(numbers, dtype=torch.int32, device=given.order.device),)

    # To bring numbers to a GPU is to wait for it.
    return torch.cat([*PLANS.get((*numbers, given.order.device), head), *tables])


@torch.no_grad()
def chosen_starts(pattern: MoBA | BlockTopK, q: Tensor, k: Tensor) -> Tensor:
    """Where the blocks that every query chose begin, ascending.

    A chosen block lies before the query's neighbourhood and is therefore whole and real, so that
    padding behind the last token changes no choice.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        int32 ``[batch, q_heads, picks, n]``, n where there is none. The number of picks is a power
        of four, so that few masks are compiled, or 0 for a pattern that chooses nothing.
    """
    (batch, heads, seq_len), queries, keys = q.shape[:3], q.flatten(0, 1), k.flatten(0, 1)
    if isinstance(pattern, MoBA):
        first, most = 0, pattern.topk - 1
        picks = _moba_picks(pattern, queries, keys)
    else:
        first, most = pattern.sinks, pattern.shared * pattern.topk
        picks = pattern.picks(queries, keys, _ascending(seq_len, q.device)[0])
        picks = picks.repeat_interleave(len(queries) // len(picks), dim=0)
    starts = (picks * pattern.block_size + first).masked_fill(picks < 0, seq_len)
    wanted = 4 ** -((most - 1).bit_length() // -2) if most else 0
    room = (0, wanted - picks.shape[-1])
    ascending = pad(starts.int().sort(dim=-1).values, room, value=seq_len)
    return ascending.transpose(1, 2).unflatten(0, (batch, heads))


def _moba_picks(pattern: MoBA, q: Tensor, k: Tensor) -> Tensor:
    """int64 ``[batch * q_heads, n, picks]``, -1 where there is none."""
    means = block_means(k, pattern.block_size)
    step = max(1, _SCORE_ELEMENTS[q.device.type] // (len(q) * max(1, means.shape[1])))
    own = torch.arange(q.shape[1], device=q.device) // pattern.block_size
    chosen = [
        pattern.rank_blocks(queries, means, blocks)
        for queries, blocks in zip(q.split(step, dim=1), own.split(step), strict=True)
    ]
    return torch.cat(chosen, dim=1)
