"""Which blocks of keys each block of queries needs: the lists that a kernel walks.

What makes them is plain torch over whole blocks. The lists are as wide as the longest that a
pattern can need; the marks they are made from hold a byte for each pair of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Marks that are turned into lists at once.
_HELD_MARKS = 1 << 24


class Blocks(NamedTuple):
    """How a kernel cuts tokens."""

    queries: int
    keys: int
    least: int = 1
    """rows, and entries of a list, that there are at least"""
    heads: int = 1
    """query heads whose queries fill a block of queries together"""


class RingInOrder(NamedTuple):
    """A ring whose tokens stand in the order of a call."""

    query_points: Tensor
    """int64 ``[draws, nq]``"""
    key_points: Tensor
    """int64 ``[draws, n]``"""
    reach: Tensor
    """int64 ``[draws or 1, nq]``"""
    size: int
    """circumference"""


class Choice(NamedTuple):
    """Blocks of keys that every query chose."""

    starts: Tensor
    """int32 ``[batch, choosers, picks, nq]``: where they begin, ascending; n where there is none"""
    size: int
    """tokens in a block"""


@dataclass(frozen=True)
class InOrder:
    """Everything that a query may see, in the order of a call.

    Args:
        queries: int64 ``[draws, nq]``, the position of the query in every place; ascending where
            there are choices or neighbourhoods.
        keys: int64 ``[draws, n]``, the same of keys.
        first: like queries, the first key of each query's neighbourhood, ascending; None for a
            pattern without neighbourhood and sinks.
        sinks: how many first keys are in view.
        heads: query heads.
        width: entries that the longest list can need, as far as the pattern tells.
    """

    queries: Tensor
    keys: Tensor
    first: Tensor | None
    sinks: int
    rings: list[RingInOrder]
    choices: list[Choice]
    heads: int
    width: int


class Lists(NamedTuple):
    """Key blocks of every block of queries: those in which the mask is tested, and whole ones.

    The two kinds share their strides, since on GPUs FlexAttention reads the second list by those of
    the first (torch 2.11).
    """

    counts: Tensor
    """int32 ``[1 or batch, 1 or choosers or heads, rows]``"""
    blocks: Tensor
    """int32 ``[.., rows, width]``, ascending; those beyond the count are 0"""
    whole_counts: Tensor
    whole_blocks: Tensor


def block_lists(given: InOrder, blocks: Blocks) -> Lists:
    """The lists of everything that is given."""
    queries, keys = given.queries.shape[1], given.keys.shape[1]
    rows = max(blocks.least, -(-queries // blocks.queries))
    columns = max(blocks.least, -(-keys // blocks.keys))
    begins = torch.arange(columns, device=given.keys.device) * blocks.keys
    earliest, latest = _extremes(given.queries, rows, blocks.queries)
    first_key = _extremes(given.keys, columns, blocks.keys)[0]
    reachable = ((first_key[:, None] <= latest[..., None]) & (begins < keys))[None]
    some = whole = torch.zeros_like(reachable)
    if given.first is not None:
        lowest, highest = _extremes(given.first, rows, blocks.queries)
        some = (begins < given.sinks) | (begins + blocks.keys > lowest[..., None])
        whole = (begins + blocks.keys <= given.sinks) | (begins >= highest[..., None])
        whole = (whole & (begins + blocks.keys <= earliest[..., None]))[None]
    for ring in given.rings:
        some = some | _blocks_in_reach(ring, rows, columns, blocks)
    list_heads = given.heads // blocks.heads
    for choice in given.choices:
        some = some | _chosen_blocks(choice, list_heads, rows, columns, keys, blocks)
    some = some & reachable & ~whole
    width = min(columns, max(blocks.least, given.width))
    return Lists(*_as_lists(some, width), *_as_lists(whole.expand_as(some), width))


def _as_lists(marks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """How many columns of ``marks [.., rows, columns]`` are marked, and which."""
    held = max(1, _HELD_MARKS // max(1, marks[..., 0, :].numel()))
    lists = []
    for some in marks.split(held, dim=-2):
        place = some.cumsum(-1, dtype=torch.int32).sub_(1)
        # One place too many takes the columns that are not marked.
        place = place.masked_fill_(~some, width).clamp_(max=width).long()
        columns = torch.arange(some.shape[-1], dtype=torch.int32, device=some.device)
        listed = torch.zeros(*some.shape[:-1], width + 1, dtype=torch.int32, device=some.device)
        lists.append(listed.scatter_(-1, place, columns.expand(some.shape))[..., :width])
    return marks.sum(-1, dtype=torch.int32), torch.cat(lists, dim=-2).contiguous()


def _extremes(x: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block of ``x [draws, n]``: ``[draws, rows]``."""
    fill = x[:, -1:].expand(-1, rows * block - x.shape[1])
    of_blocks = torch.cat([x, fill], dim=1).unflatten(1, (rows, block))
    return of_blocks.amin(-1), of_blocks.amax(-1)


def _blocks_in_reach(ring: RingInOrder, rows: int, columns: int, blocks: Blocks) -> Tensor:
    """Key blocks with points, lowest to highest, in reach: bool ``[1, draws, rows, columns]``."""
    low, high = (x[..., None] for x in _extremes(ring.query_points, rows, blocks.queries))
    key_low, key_high = (x[:, None] for x in _extremes(ring.key_points, columns, blocks.keys))
    reach = _extremes(ring.reach, rows, blocks.queries)[1][..., None]
    in_reach = torch.zeros((), dtype=torch.bool, device=reach.device)
    for around in (-ring.size, 0, ring.size):
        ahead = key_low + around - high
        behind = low - key_high - around
        in_reach = in_reach | (torch.maximum(ahead, behind) <= reach)
    return in_reach[None]


def _chosen_blocks(
    choice: Choice, list_heads: int, rows: int, columns: int, keys: int, blocks: Blocks
) -> Tensor:
    """Key blocks with a key of a chosen block: bool ``[batch, choosers, rows, columns]``."""
    starts, size = choice
    if starts.shape[1] > list_heads:
        # Heads that share a tile share its list.
        starts = starts.unflatten(1, (list_heads, -1)).flatten(2, 3)
    batch, choosers, _, queries = starts.shape
    row = torch.arange(queries, device=starts.device) // blocks.queries
    # One column too many takes the marks of absent blocks.
    marks = starts.new_zeros(batch, choosers, rows * (columns + 1), dtype=torch.bool)
    last = (starts + size - 1) // blocks.keys
    # A block of `size` tokens reaches into so many key blocks after that of its first.
    for step in range((size + blocks.keys - 2) // blocks.keys + 1):
        column = torch.minimum(starts // blocks.keys + step, last)
        column = column.where(starts < keys, columns)
        marks.scatter_(-1, (row * (columns + 1) + column).flatten(2).long(), True)
    return marks.unflatten(-1, (rows, columns + 1))[..., :-1]
