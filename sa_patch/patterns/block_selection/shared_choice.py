"""Choices that a tile of queries shares: what the queries of the tile chose so far.

A tile holds the queries at `shared` positions from a multiple of `shared` on. Query i sees what the
queries of its tile up to i chose, so that nothing depends on later tokens, and a tile reads each
block once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TileChoices(NamedTuple):
    """The blocks of every tile, each once."""

    blocks: Tensor
    """int64 ``[choosers, tiles, m]``, in the order in which they were chosen; -1 for none."""
    first_row: Tensor
    """int64, like `blocks`: the first row of the tile, 0 to ``shared - 1``, that sees the block."""
    counts: Tensor
    """int32 ``[choosers, tiles]``: blocks that there are, which stand in front."""


def tile_choices(picks: Tensor, shared: int) -> TileChoices:
    """Unite the choices of each tile, without asking the device how many there are.

    Args:
        picks: int64 ``[choosers, nq, topk]``, -1 for none; the first query begins a tile. What the
            last tile lacks of `shared` queries chooses nothing.

    Returns:
        `TileChoices` with ``m = shared * topk``.
    """
    topk = picks.shape[2]
    missing = -picks.shape[1] % shared
    if missing:
        picks = torch.nn.functional.pad(picks, (0, 0, 0, missing), value=-1)
    entries = picks.unflatten(1, (-1, shared)).flatten(2)
    # A stable sort leaves the earliest choice of a block in front.
    ordered, order = entries.sort(dim=-1, stable=True)
    repeated = ordered[..., 1:] == ordered[..., :-1]
    repeated = torch.nn.functional.pad(repeated, (1, 0), value=False)
    again = torch.empty_like(repeated).scatter_(-1, order, repeated)
    blocks = entries.masked_fill(again, -1)
    # What was chosen anew stands in front, in its order.
    there = blocks >= 0
    front = there.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    counts = there.sum(-1, dtype=torch.int32)
    return TileChoices(blocks.gather(-1, front), front // max(1, topk), counts)


def chosen_so_far(picks: Tensor, shared: int) -> Tensor:
    """The blocks that each query sees by the choices of its tile.

    Args:
        picks: as of `tile_choices`.

    Returns:
        int64 ``[choosers, nq, shared * topk]``, each block once, -1 for none.
    """
    choices = tile_choices(picks, shared)
    rows = torch.arange(shared, device=picks.device)[:, None]
    seen = choices.first_row[:, :, None] <= rows
    so_far = choices.blocks[:, :, None].where(seen, -1).flatten(1, 2)
    return so_far[:, : picks.shape[1]]


def expected_choices(eligible: Tensor, picks: Tensor, shared: int) -> Tensor:
    """Blocks that each query of a sequence would see if all chose at random: float64.

    Args:
        eligible: int64 ``[seq_len]``, blocks that each query may choose from.
        picks: int64 ``[seq_len]``, blocks that it chooses for itself where there are as many.
    """
    if shared == 1:
        return eligible.minimum(picks).double()
    choosers = torch.arange(len(eligible), device=eligible.device) % shared + 1
    blocks = eligible.double()
    missed = 1 - picks / blocks.maximum(picks.clamp(min=1))
    return blocks * (1 - missed.pow(choosers))
