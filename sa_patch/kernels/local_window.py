"""What queries see unchosen and undrawn: the first tokens, and a neighbourhood up to their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.kernels.tiling import whole_vectors
from sa_patch.patterns import SWA, BlockTopK, MoBA, Pattern, Sinks


class Run(NamedTuple):
    """Tiles of queries at even distances, each of which meets the last `width` keys up to its end.

    Args:
        skipped: tiles before the first one.
        stride: tiles from one to the next.
        width: keys.
        alike: whether all see the same, each shifted.
    """

    skipped: int
    stride: int
    width: int
    alike: bool


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

    def until_aligned(self, position: int, tile: int) -> int:
        """Queries from a position on until a tile of them would lie within one long block."""
        return (self.neighbourhoods[0][0] - position) % tile if self._tiles_of_block(tile) else 0

    def runs(self, position: int, tile: int, width: int) -> list[Run]:
        """What tiles of queries from a position on (of `until_aligned`) meet, all runs together.

        Args:
            tile: queries of a tile.
            width: the most keys that a tile needs.
        """
        long = self._tiles_of_block(tile)
        if not long:
            # Tiles of whole blocks see the same.
            alike = all(tile % block == 0 for _, block, _ in self.neighbourhoods)
            return [Run(0, 1, width, alike)]
        ((origin, _, local),) = self.neighbourhoods
        # A block's first tiles need fewer keys than its last.
        begins = (position - origin) // tile
        return [
            Run(
                (place - begins) % long,
                long,
                whole_vectors(self.sinks + local + (place + 1) * tile) - self.sinks,
                alike=True,
            )
            for place in range(long)
        ]

    def _tiles_of_block(self, tile: int) -> int:
        """Of how many tiles the blocks of the only neighbourhood consist; 0 if of none."""
        if len(self.neighbourhoods) != 1:
            return 0
        ((_, block, _),) = self.neighbourhoods
        return block // tile if block % tile == 0 and block > tile else 0

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
