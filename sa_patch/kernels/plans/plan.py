"""From a pattern to a plan: an order of tokens, lists of key blocks, and what the mask reads.

SA alone, or PSA, has its tokens in the order of its ring, where a block of queries needs a band of
keys. All else keeps the order of positions. There a ring shows every block of queries some key of
nearly every earlier block; so a union is cut into passes, each with an order of its own, that leave
out what earlier ones show. A kernel that cannot join passes takes all in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.local_window import LocalWindow, joined, local_window_of
from sa_patch.kernels.plans.block_lists import (
    Blocks,
    Choice,
    InOrder,
    Lists,
    RingInOrder,
    block_lists,
)
from sa_patch.kernels.plans.chosen import chosen_starts
from sa_patch.kernels.plans.tables import Structure, mask_tables
from sa_patch.kernels.tensor_cache import TensorCache
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, parts_of
from sa_patch.patterns.ring import Ring

# At 128K tokens the plan of a layer takes 12 MiB on a GPU, so that all layers of a model stay.
PLANS = TensorCache(limit=512 << 20)
# The circumference of an open line: so large that nothing is near the other way round.
_OPEN = 1 << 30
# Behind every key.
_NOWHERE = 1 << 40
# The parts of patterns that have plans.
KINDS = (Full, Sinks, SWA, SA, PSA, MoBA, BlockTopK)


class Pass(NamedTuple):
    """What one call of a kernel shows, and what it leaves out as shown by others."""

    local: LocalWindow
    rings: tuple[SA | PSA, ...] = ()
    choices: tuple[MoBA | BlockTopK, ...] = ()
    without: tuple[Pattern, ...] = ()

    @property
    def ordered(self) -> bool:
        """Whether tokens stand in the order of its ring."""
        return len(self.rings) == 1 and self.local == joined_local(()) and not self.choices


class Plan(NamedTuple):
    """How a pass is computed on sequences of one length."""

    queries: Tensor
    """int64 ``[draws, nq]``: the query in every place, counted from the first one"""
    keys: Tensor
    """int64 ``[draws, n]``: the key in every place"""
    places: Tensor
    """int64 ``[draws, nq]``: the place of every query"""
    lists: Lists
    tables: Tensor
    """int32 ``[numbers]``: what the mask reads"""
    numbers: Tensor
    """int64, on the CPU: those in front of the tables, for kernels that are handed them"""
    structure: Structure
    """how the mask reads them"""


def joined_local(parts: Sequence[Pattern]) -> LocalWindow:
    """What parts show without drawing or choosing; `Full` as a window without an end."""
    windows = [local_window_of(SWA(1 << 30) if isinstance(p, Full) else p) for p in parts]
    return joined([*windows, LocalWindow(0, ())])


def whole_pass(pattern: Pattern) -> Pass:
    """A pattern in one pass."""
    return _pass(parts_of(pattern.computed_as))


def passes(pattern: Pattern) -> list[Pass]:
    """A pattern in passes that show no key of a query twice: the ring of each part by itself."""
    parts = parts_of(pattern.computed_as)
    rings = [part for part in parts if isinstance(part, (SA, PSA))]
    others = tuple(part for part in parts if not isinstance(part, (SA, PSA)))
    found = [_pass(others)] if others else []
    for number, ring in enumerate(rings):
        found.append(_pass((ring,), without=(*others, *rings[:number])))
    return found


def _pass(parts: tuple[Pattern, ...], without: tuple[Pattern, ...] = ()) -> Pass:
    return Pass(
        joined_local(parts),
        tuple(part for part in parts if isinstance(part, (SA, PSA))),
        tuple(part for part in parts if isinstance(part, (MoBA, BlockTopK))),
        without,
    )


def plan_of(given: Pass, q: Tensor, k: Tensor, *, layer: int, blocks: Blocks) -> Plan:
    """The plan of a pass.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``, the last queries where they are fewer than the keys.
        k: ``[batch, kv_heads, n, head_dim]``.
    """
    heads, device = q.shape[1], q.device
    hidden = _pass(given.without)
    drawn = (*given.rings, *hidden.rings)
    draws = heads if any(part.per_head for part in drawn) else 1
    choices = [_choice(part, q, k, draws) for part in (*given.choices, *hidden.choices)]
    shown = [True] * len(given.choices) + [False] * len(hidden.choices)
    kept = [at for at, choice in enumerate(choices) if choice.starts.shape[2]]
    choices, shown = [choices[at] for at in kept], [shown[at] for at in kept]
    choosers = max([1, *(choice.starts.shape[1] for choice in choices)])
    choices = [_of_choosers(choice, choosers) for choice in choices]
    local, hides = (given.local, False) if not _empty(given.local) else (hidden.local, True)
    structure = Structure(
        ordered=given.ordered,
        local=0 if _empty(local) else -1 if hides else 1,
        per_head=draws > 1,
        rings=tuple([True] * len(given.rings) + [False] * len(hidden.rings)),
        choices=tuple(
            (seen, choice.starts.shape[2].bit_length() - 1)
            for seen, choice in zip(shown, choices, strict=True)
        ),
    )

    def build() -> tuple[Tensor, ...]:
        return _built(given, local, drawn, choices, structure, q, k, layer, blocks)

    if choices:
        queries, keys, places, tables, numbers, *lists = build()
    else:
        sizes = (q.shape[2], k.shape[2])
        key = (given, layer if drawn else 0, draws, sizes, blocks, device)
        queries, keys, places, tables, numbers, *lists = PLANS.get(key, build)
    return Plan(queries, keys, places, Lists(*lists), tables, numbers, structure)


def _empty(local: LocalWindow) -> bool:
    return not local.sinks and not local.neighbourhoods


def _choice(part: MoBA | BlockTopK, q: Tensor, k: Tensor, draws: int) -> Choice:
    choice = Choice(chosen_starts(part, q, k), part.block_size)
    # Draws for every head want the choices of every head.
    return _of_choosers(choice, draws) if draws > 1 else choice


def _of_choosers(choice: Choice, choosers: int) -> Choice:
    each = choosers // choice.starts.shape[1]
    return choice._replace(starts=choice.starts.repeat_interleave(each, dim=1))


def _built(
    given: Pass,
    local: LocalWindow,
    drawn: tuple[SA | PSA, ...],
    choices: list[Choice],
    structure: Structure,
    q: Tensor,
    k: Tensor,
    layer: int,
    blocks: Blocks,
) -> tuple[Tensor, ...]:
    """Queries, keys, places, tables, their numbers, and the four lists."""
    (heads, count), seq_len, device = q.shape[1:3], k.shape[2], q.device
    start = seq_len - count
    rings = [part.ring(seq_len, layer, heads, device) for part in drawn]
    if structure.ordered:
        queries, keys = (_ring_order(drawn[0], rings[0], first) for first in (start, 0))
    else:
        queries, keys = (torch.arange(x, seq_len, device=device)[None] for x in (start, 0))
    in_order = [_ring_in_order(ring, queries, keys) for ring in rings]
    starts = [_starts_in_order(choice, queries - start) for choice in choices]
    first = local.first(queries) if structure.local else None
    tables, numbers = mask_tables(
        queries, keys, first, local.sinks, in_order, starts, heads, seq_len
    )
    if first is not None and not local.neighbourhoods:
        # So that no block is listed for it.
        first = torch.full_like(queries, _NOWHERE)
    lists = block_lists(
        InOrder(
            queries,
            keys,
            first if structure.local > 0 else None,
            local.sinks,
            [ring for ring, seen in zip(in_order, structure.rings, strict=True) if seen],
            [one for one, (seen, _) in zip(starts, structure.choices, strict=True) if seen],
            heads,
            _width(given, blocks, seq_len),
        ),
        blocks,
    )
    places = (queries - start).argsort(dim=1)
    return queries - start, keys, places, tables, numbers, *lists


def _ring_order(part: SA | PSA, ring: Ring, start: int) -> Tensor:
    """Neighbours on the ring side by side: int64 ``[draws, n - start]``, a position in each place.

    Segment by segment where reaches shrink, so that those of a block's queries differ little.
    """
    seq_len = ring.seq_len
    bounds = [0, seq_len]
    if isinstance(part, PSA):
        bounds = [0, *(1 << m for m in range(seq_len.bit_length()) if 1 << m < seq_len), seq_len]
    bounds = [max(start, bound) for bound in bounds]
    segments = [
        low + ring.points[:, low:high].argsort(dim=1, stable=True)
        for low, high in zip(bounds, bounds[1:], strict=False)
        if high > low
    ]
    return torch.cat(segments, dim=1)


def _ring_in_order(ring: Ring, queries: Tensor, keys: Tensor) -> RingInOrder:
    draws = max(len(queries), len(ring.points))
    points = ring.points.expand(draws, -1)
    return RingInOrder(
        points.gather(1, queries.expand(draws, -1)),
        points.gather(1, keys.expand(draws, -1)),
        ring.reach[queries],
        _OPEN if ring.size is None else ring.size,
    )


def _starts_in_order(choice: Choice, queries: Tensor) -> Choice:
    """The choices of the queries in their places."""
    if len(queries) > 1:
        index = queries[None, :, None].expand(len(choice.starts), -1, choice.starts.shape[2], -1)
        return choice._replace(starts=choice.starts.gather(3, index))
    return choice._replace(starts=choice.starts[..., queries[0]])


def _width(given: Pass, blocks: Blocks, keys: int) -> int:
    """Entries that the longest list can need, from what the pattern says without a look at it."""
    most = 0
    if given.local.sinks:
        most += -(-given.local.sinks // blocks.keys)
    if given.local.reach >= 0:
        most += (given.local.reach + blocks.queries - 2) // blocks.keys + 2
    for ring in given.rings:
        # Points of a smaller ring than the reach, or of segments, may lie anywhere.
        anywhere = isinstance(ring, PSA) or not given.ordered
        # Around the end of the ring lies a block that is not full.
        band = (2 * ring.window - 2 + blocks.queries - 2) // blocks.keys + 3
        most += keys if anywhere else band
    for part in given.choices:
        own = part.topk - 1 if isinstance(part, MoBA) else part.most_picks(keys)
        picks = part.shared_queries * own
        most += blocks.heads * blocks.queries * picks * ((part.block_size - 2) // blocks.keys + 2)
    return most
