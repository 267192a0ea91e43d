"""What queries see unchosen and undrawn: the first tokens, and a neighbourhood up to their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.patterns import SWA, BlockTopK, MoBA, Pattern, Sinks


@dataclass(frozen=True)
class LocalWindow:
    """Query i sees the keys ``j <= i`` that are sinks, or not before a first key of its own.

    Several neighbourhoods are the largest of them, so that a union has one local window.

    Args:
        sinks: how many first tokens are in view.
        neighbourhoods: ``(origin, block, local)``: the query's own block, where blocks of `block`
            tokens are counted from `origin` on, and the `local` tokens before that block.
    """

    sinks: int
    neighbourhoods: tuple[tuple[int, int, int], ...]

    @property
    def reach(self) -> int:
        """How far before its own a query's first key can lie; -1 without a neighbourhood."""
        return max((block - 1 + local for _, block, local in self.neighbourhoods), default=-1)

    def first(self, i: Tensor) -> Tensor:
        """The first key of each query's neighbourhood, ``i + 1`` if it has none; ascending."""
        first = i + 1
        for origin, block, local in self.neighbourhoods:
            begins = (i - origin).div(block, rounding_mode="floor") * block - local
            first = torch.minimum(first, begins.clamp(min=0) + origin)
        return first

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether query i sees key j, for ``j <= i``: a `Rule`."""
        return (j < self.sinks) | (j >= self.first(i))

    def repeats(self, tile: int) -> bool:
        """Whether tiles of so many queries see the same, each shifted by a tile."""
        return all(tile % block == 0 for _, block, _ in self.neighbourhoods)

    def all_seen(self, seq_len: int) -> int:
        """How many first queries of a sequence see every key up to their own."""
        positions = torch.arange(seq_len)
        return int((self.first(positions) <= self.sinks).sum())


def local_window_of(pattern: Pattern) -> LocalWindow:
    """What a pattern that is no union shows without drawing or choosing."""
    if isinstance(pattern, Sinks):
        return LocalWindow(pattern.size, ())
    if isinstance(pattern, SWA):
        return LocalWindow(0, ((0, 1, pattern.window - 1),))
    if isinstance(pattern, MoBA):
        return LocalWindow(0, ((0, pattern.block_size, 0),))
    if isinstance(pattern, BlockTopK):
        if pattern.segment:
            return LocalWindow(pattern.sinks, ((0, pattern.segment, 0),))
        return LocalWindow(pattern.sinks, ((pattern.sinks, pattern.block_size, pattern.local),))
    return LocalWindow(0, ())


def joined(windows: list[LocalWindow]) -> LocalWindow:
    """What any of them shows, without neighbourhoods that lie within another."""
    wanted: list[tuple[int, int, int]] = []
    several = [each for window in windows for each in window.neighbourhoods]
    for each in sorted(several, key=lambda each: (-each[2], -each[1])):
        # A neighbourhood of single steps holds all that reach no farther.
        if not any(block == 1 and each[1] - 1 + each[2] <= local for _, block, local in wanted):
            wanted.append(each)
    return LocalWindow(max(window.sinks for window in windows), tuple(wanted))
