"""What a mask reads: tables end to end in one tensor, behind numbers that say where they begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.plans.block_lists import Choice, RingInOrder
from sa_patch.kernels.tensor_cache import TensorCache

# Numbers of each thing that a mask may read.
ENTRY = 8
# Rows of the last tile beyond the last query read on behind their table, so that what lies there
# has to be memory of ours. What they read is not used.
_BEYOND = 512
_HEADERS = TensorCache(limit=1 << 20)


class Structure(NamedTuple):
    """What of a mask is compiled in."""

    ordered: bool
    """whether tokens stand in another order than that of their positions"""
    local: int
    """1 where sinks and neighbourhoods are in view, -1 where they are left out, 0 without any"""
    per_head: bool
    """whether points are drawn for every query head"""
    rings: tuple[bool, ...]
    """of each ring that is read whether it shows or leaves out"""
    choices: tuple[tuple[bool, int], ...]
    """of each pattern that chooses blocks the same, and log2 of how many a query chooses"""


class MaskTables(NamedTuple):
    """What a mask reads."""

    tables: Tensor
    """int32, the numbers in front"""
    numbers: Tensor
    """int64, on the CPU: the same, for kernels that are handed them"""


def mask_tables(
    queries: Tensor,
    keys: Tensor,
    first: Tensor | None,
    sinks: int,
    rings: Sequence[RingInOrder],
    choices: Sequence[Choice],
    heads: int,
    seq_len: int,
) -> MaskTables:
    """All tables end to end, behind `ENTRY` numbers for each thing that the mask may read.

    These are, of a table, where it begins and how far apart its draws are (0 for a single one):

    - positions of queries and of keys, first keys of neighbourhoods; the number of sinks, and the
      position of the first query;
    - of each ring the points of queries and of keys, reaches; and its size;
    - of each choice its starts; the number of choosers, of query heads to each, of queries, and of
      tokens in a block.

    One tensor holds all, because every index brings the size of its tensor into the mask, and the
    C++ template of torch 2.13 confuses the names of two sizes in a mask.
    """
    tables: list[Tensor] = []
    numbers: list[int] = []
    end = ENTRY * (1 + len(rings) + len(choices))

    def note(*added: Tensor) -> None:
        nonlocal end
        for table in added:
            numbers.extend((end, table.shape[1] if len(table) > 1 else 0))
            tables.append(table.flatten().int())
            end += table.numel()

    note(queries, keys, queries if first is None else first)
    numbers.extend((sinks, seq_len - queries.shape[1]))
    for ring in rings:
        note(ring.query_points, ring.key_points, ring.reach)
        numbers.extend((ring.size, 0))
    for starts, size in choices:
        choosers, count = starts.shape[1], starts.shape[3]
        note(starts.flatten(0, 1).flatten(1))
        numbers.extend((choosers, heads // choosers, count, size, 0, 0))

    def header() -> tuple[Tensor]:
        told = torch.tensor(numbers, dtype=torch.int32)
        if keys.device.type == "cuda":
            # From pageable memory the copy would wait for all work queued before it.
            told = told.pin_memory()
        return (told.to(keys.device, non_blocking=True),)

    behind = torch.zeros(_BEYOND, dtype=torch.int32, device=keys.device)
    front = _HEADERS.get((*numbers, keys.device), header)
    return MaskTables(torch.cat([*front, *tables, behind]), torch.tensor(numbers))
