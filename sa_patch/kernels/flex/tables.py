"""The one tensor of tables that a mask reads, and where each table stands in it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from sa_patch.kernels.flex.kernel import LocalWindow, Table
from sa_patch.kernels.tensor_cache import TensorCache
from sa_patch.patterns.ring import Ring

# A PSA layer of 128K tokens takes 6 MiB and one of SA 1.5, so that all layers of one model stay.
plans = TensorCache(limit=512 << 20)

# The position of a key that is not there: behind every query. Also larger than every ring.
NOWHERE = 1 << 30


class Tables:
    """int32 tables, laid end to end in the order in which they are added."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._size = device, 0
        self._parts: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def add(self, table: Tensor) -> int:
        """A table of any shape, whose place the caller remembers."""
        start = self._size
        self._parts.append(table.to(torch.int32).flatten())
        self._size += table.numel()
        return start

    def add_by_position(self, table: Tensor) -> None:
        """A table ``[draws, rows]``: one draw, or one for each head."""
        by_head = table.shape[1] if len(table) > 1 else 0
        self._note(self.add(table), by_head)

    def add_local_window(self, ring: Ring, queries: Tensor, keys: Tensor) -> None:
        """What tells who is within reach, of ``queries [draws, n]`` and ``keys [draws, nk]``."""
        self.add_by_position(_points(ring, queries))
        self.add_by_position(_points(ring, keys.clamp(max=ring.seq_len - 1)))
        self.add_by_position(ring.reach[queries])
        self._note(NOWHERE if ring.size is None else ring.size)

    def _note(self, *values: int) -> None:
        self._numbers += numbers(("table", len(self._numbers)), values, self._device)

    def joined(self) -> tuple[Tensor, ...]:
        """The tables, int32 ``[numbers]``, and the numbers that `table` and `near` read back."""
        return torch.cat(self._parts), *self._numbers


def table(noted: Iterator[Tensor]) -> Table:
    return Table(next(noted), next(noted))


def near(noted: Iterator[Tensor]) -> LocalWindow:
    return LocalWindow(table(noted), table(noted), table(noted), next(noted))


def _points(ring: Ring, positions: Tensor) -> Tensor:
    """Points at ``positions [draws, m]``, for as many draws as either has."""
    positions = positions.expand(max(len(positions), len(ring.points)), -1)
    return ring.points.expand(len(positions), -1).gather(1, positions)


def absent_keys(keys: int, block: int) -> int:
    """How many places there are up to the sentinel's, which opens a block, and with it."""
    return -keys % block + 1


def numbers(purpose: Hashable, values: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Values as the kernels take them: int64, one element each.

    Args:
        purpose: what the numbers are in a call. Those of different purposes are different tensors,
            even where they are equal: torch compiles in which inputs are one and the same.
    """

    def build() -> tuple[Tensor, ...]:
        return tuple(torch.tensor(value, device=device) for value in values)

    return plans.get(("numbers", purpose, values, device), build)
