"""Which blocks of keys each block of queries needs: the lists that FlexAttention walks.

They hold n^2 / block^2 entries, which is the form FlexAttention takes. What makes them is plain
torch over whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class RingInOrder(NamedTuple):
    """A ring whose tokens stand in the order of a call."""

    points: Tensor
    """int64 ``[draws, n]``"""
    reach: Tensor
    """int64 ``[draws or 1, n]``"""
    size: int
    """circumference"""


class Choice(NamedTuple):
    """Blocks of keys that every query chose."""

    starts: Tensor
    """int32 ``[batch, q_heads, picks, n]``: where they begin, ascending; n where there is none"""
    size: int
    """tokens in a block"""


@dataclass(frozen=True)
class InOrder:
    """Everything that a query may see, in the order of a call.

    Args:
        order: int64 ``[draws, n]``, the position of the token in every place; ascending where there
            are choices or neighbourhoods.
        first: like order, the first key of each query's neighbourhood, ascending; None for a
            pattern without neighbourhood and sinks.
        sinks: how many first keys are in view.
    """

    order: Tensor
    first: Tensor | None
    sinks: int
    rings: list[RingInOrder]
    choices: list[Choice]


def block_lists(given: InOrder, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key blocks of which some pairs are visible, in which the mask is tested; and whole ones.

    Args:
        block: queries, and keys, of one block.

    Returns:
        Of either kind int32 counts ``[1 or batch, 1 or heads, rows]`` and key blocks
        ``[.., rows, rows]``, the counted ones first. Their strides are the same, since on GPUs
        FlexAttention reads the second list by those of the first (torch 2.11). There are at least
        two rows, because sizes of 1 are compiled in.
    """
    seq_len = given.order.shape[1]
    rows = max(2, -(-seq_len // block))
    begins = torch.arange(rows, device=given.order.device) * block
    earliest, latest = _extremes(given.order, rows, block)
    reachable = ((earliest[:, None] <= latest[..., None]) & (begins < seq_len))[None]
    some = whole = torch.zeros_like(reachable)
    if given.first is not None:
        lowest, highest = _extremes(given.first, rows, block)
        some = (begins < given.sinks) | (begins + block > lowest[..., None])
        whole = (begins + block <= given.sinks) | (begins >= highest[..., None])
        whole = (whole & (begins < begins[:, None]))[None]
    for ring in given.rings:
        some = some | _blocks_in_reach(ring, rows, block)
    for choice in given.choices:
        some = some | _chosen_blocks(choice, rows, block)
    some = some & reachable & ~whole
    return *_as_lists(some), *_as_lists(whole.expand_as(some))


def _as_lists(marks: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of ``marks [.., rows, columns]`` are marked; those before the others."""
    # A bool does not sort on every device.
    order = marks.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return marks.sum(-1, dtype=torch.int32), order.int().contiguous()


def _extremes(x: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block of ``x [draws, n]``: ``[draws, rows]``."""
    fill = x[:, -1:].expand(-1, rows * block - x.shape[1])
    blocks = torch.cat([x, fill], dim=1).unflatten(1, (rows, block))
    return blocks.amin(-1), blocks.amax(-1)


def _blocks_in_reach(ring: RingInOrder, rows: int, block: int) -> Tensor:
    """Key blocks with points, of lowest to highest, in reach: bool ``[1, draws, rows, rows]``."""
    low, high = _extremes(ring.points, rows, block)
    reach = _extremes(ring.reach, rows, block)[1][..., None]
    in_reach = torch.zeros((), dtype=torch.bool, device=reach.device)
    for around in (-ring.size, 0, ring.size):
        ahead = low[:, None] + around - high[..., None]
        behind = low[..., None] - high[:, None] - around
        in_reach = in_reach | (torch.maximum(ahead, behind) <= reach)
    return in_reach[None]


def _chosen_blocks(choice: Choice, rows: int, block: int) -> Tensor:
    """Key blocks with a key of a chosen block: bool ``[batch, q_heads, rows, rows]``."""
    starts, size = choice
    batch, heads, _, seq_len = starts.shape
    row = torch.arange(seq_len, device=starts.device) // block
    # One column too many takes the marks of absent blocks.
    marks = torch.zeros(batch, heads, rows * (rows + 1), dtype=torch.bool, device=starts.device)
    last = (starts + size - 1) // block
    # A block of `size` tokens reaches into so many key blocks after that of its first.
    for step in range((size + block - 2) // block + 1):
        column = torch.minimum(starts // block + step, last)
        column = torch.where(starts < seq_len, column, rows)
        marks.scatter_(-1, (row * (rows + 1) + column).flatten(2).long(), True)
    return marks.unflatten(-1, (rows, rows + 1))[..., :-1]
