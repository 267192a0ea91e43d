"""Patterns as the pieces that the Triton kernels serve, no key of a query in two of them.

The local window comes first, then rings, then chosen blocks; each leaves out what those before it
show. The first two tell that by position, from one table of where its keys begin.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from sa_patch.kernels.triton.launch_table import UNLIMITED
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, parts_of

# Smaller blocks fill too little of a matrix product to be worth sorting queries for.
_SORTED_BLOCK = 16


class LocalWindow(NamedTuple):
    """The keys of a query that depend on its position alone."""

    sinks: int = 0
    """first tokens in view"""
    edges: tuple[tuple[int, int, int], ...] = ()
    """(origin, block, behind): tokens from `origin` on are cut into blocks of `block`; in view are
    the query's own and the `behind` before it, later keys left out. The widest view counts."""
    dense: int = 0
    """queries at earlier positions than this see every key"""

    @property
    def everywhere(self) -> bool:
        """Whether later queries than the dense ones may see something."""
        return bool(self.sinks or self.edges)

    def lows(self, seq_len: int, device: torch.device, stream: int) -> Tensor:
        """The first key beyond the sinks that each query sees, never decreasing.

        Args:
            stream: of `current_stream`; the table is filled by work queued there.

        Returns:
            int32, at least `seq_len`: ``i + 1`` where query i sees none.
        """
        # Lengths that follow each other, as in decoding, share a table.
        return _lows(self, 1 << seq_len.bit_length(), device, stream)


EVERYTHING = LocalWindow(dense=UNLIMITED)
NOTHING = LocalWindow()


@lru_cache(maxsize=64)
def _lows(local_window: LocalWindow, size: int, device: torch.device, stream: int) -> Tensor:
    low = torch.arange(1, size + 1, dtype=torch.int32, device=device)
    if not (local_window.edges or local_window.dense):
        return low
    i = torch.arange(size, device=device)
    for origin, block, behind in local_window.edges:
        # A block that holds all, however large, is as good as another.
        block, behind = min(block, UNLIMITED), min(behind, UNLIMITED)
        own = torch.div(i - origin, block, rounding_mode="floor")
        low = torch.minimum(low, origin + (own - behind).clamp(min=0) * block)
    if local_window.dense:
        low = low.masked_fill(i < local_window.dense, 0)
    return low.to(torch.int32)


class DisjointParts(NamedTuple):
    """A pattern, taken apart."""

    local_window: LocalWindow
    rings: tuple[SA | PSA, ...]
    chosen: tuple[MoBA | BlockTopK, ...]


def sorts_choices(pattern: MoBA | BlockTopK) -> bool:
    """Whether queries are sorted by the blocks they chose; else each gathers its keys."""
    return isinstance(pattern, MoBA) or pattern.block_size >= _SORTED_BLOCK


def shares_tiles(pattern: MoBA | BlockTopK) -> TypeGuard[BlockTopK]:
    """Whether tiles of queries share their choices."""
    return isinstance(pattern, BlockTopK) and pattern.shared > 1


def takes_local_window(pattern: MoBA | BlockTopK) -> bool:
    """Whether its chosen blocks and the local window can be served together."""
    return shares_tiles(pattern) or sorts_choices(pattern)


# Asked several times in every call.
@lru_cache(maxsize=256)
def disjoint_parts(pattern: Pattern) -> DisjointParts | None:
    """The pieces of a pattern; None for one that has a part unknown here."""
    rings: list[SA | PSA] = []
    chosen: list[MoBA | BlockTopK] = []
    edges: list[tuple[int, int, int]] = []
    sinks = dense = 0
    for part in parts_of(pattern):
        if isinstance(part, Full):
            dense = UNLIMITED
        elif isinstance(part, Sinks):
            sinks = max(sinks, part.size)
        elif isinstance(part, SWA):
            edges.append((0, 1, part.window - 1))
        elif isinstance(part, SA):
            rings.append(part)
        elif isinstance(part, PSA):
            rings.append(part)
            # Their reach is half the ring: nothing is beyond it.
            dense = max(dense, part.window)
        elif isinstance(part, MoBA):
            chosen.append(part)
            edges.append((0, part.block_size, 0))
        elif isinstance(part, BlockTopK):
            chosen.append(part)
            sinks = max(sinks, part.sinks)
            if part.segment:
                edges.append((0, part.segment, 0))
            else:
                edges.append((part.sinks, part.block_size, part.local // part.block_size))
        else:
            return None
    local_window = LocalWindow(min(sinks, UNLIMITED), tuple(sorted(edges)), min(dense, UNLIMITED))
    return DisjointParts(local_window, tuple(rings), tuple(chosen))
