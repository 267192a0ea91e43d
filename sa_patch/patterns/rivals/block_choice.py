"""What methods share in which a block of queries chooses blocks of keys by a share of attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.errors import UserError
from sa_patch.patterns.base import whole_number
from sa_patch.patterns.rivals.whole_prompt import Chooser, WholePrompt

Mass = Callable[[int], Tensor]
"""``mass(tile)``: how much of a tile's attention each block of keys up to its own is thought to
get, fp32 ``[q_heads, tile + 1]``, none below 0."""


@dataclass(frozen=True)
class BlockChoice(WholePrompt):
    """A block of queries sees itself, the first block, and blocks of keys that it chooses.

    With `topk` so many blocks are in view, own and first among them; with `threshold` the fewest
    whose mass is that share of all, own and first among them. Of equal ones the earlier wins.
    """

    block_size: int
    topk: int = 0
    threshold: float = 0.0

    least_blocks: ClassVar[int] = 2
    """Blocks that are always in view."""

    def check_choice(self, usual: float) -> None:
        """Check `block_size`, and that either `topk` or `threshold` is given.

        Args:
            usual: the threshold where neither is.
        """
        whole_number(self.block_size, "block_size", 1)
        whole_number(self.topk, "topk", 0)
        share(self.threshold, "threshold", least=0)
        if 0 < self.topk < self.least_blocks:
            raise UserError("topk must be at least 2, for a block itself and the first one; got 1")
        if self.topk and self.threshold:
            raise UserError(f"give {self.name} either topk or threshold, not both")
        if not self.topk and not self.threshold:
            object.__setattr__(self, "threshold", usual)

    @abstractmethod
    def mass(self, q: Tensor, k: Tensor) -> Mass:
        """What the blocks of one prompt are chosen by; q and k as of `chooser`."""

    @property
    def tile(self) -> int:
        return self.block_size

    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        mass = self.mass(q, k)

        def choose(tile: int) -> Tensor:
            certain = torch.zeros(tile + 1, dtype=torch.bool, device=q.device)
            certain[:: max(1, tile)] = True
            return whole_blocks(self.chosen(mass(tile), certain), self.block_size)

        return choose

    def chosen(self, mass: Tensor, certain: Tensor) -> Tensor:
        """Which blocks are in view: bool like ``mass [..., blocks]``."""
        if self.topk:
            return most(mass, certain, self.topk)
        return covering(mass, certain, self.threshold)

    @property
    def keys_are_bounds(self) -> bool:
        return not self.topk

    @property
    def counts_need_content(self) -> bool:
        return not self.topk

    def keys_per_query(self, seq_len: int) -> Tensor:
        """Visible keys; under a threshold the most that there may be, which is all of them."""
        i = torch.arange(seq_len)
        hidden = (i // self.block_size + 1 - self.topk).clamp(min=0) if self.topk else 0 * i
        return (i + 1 - hidden * self.block_size).double()

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        if not self.topk:
            return super().count_visible(seq_len, layer=layer, heads=heads)
        return self.keys_per_query(seq_len).long()[None]

    def saturated(self, seq_len: int) -> bool:
        blocks = -(-seq_len // self.block_size)
        # The first block and a query's own are always in view.
        return blocks <= max(self.topk, 2) or self.threshold >= 1

    @property
    def effective_window(self) -> int | None:
        """Keys of `topk` blocks; None where the text decides how many there are."""
        return self.block_size * self.topk if self.topk else None


def share(value: float, field: str, *, least: float) -> float:
    """Return `value` if it is a number from `least` to 1.

    Raises:
        UserError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
        raise UserError(f"{field} must be a number from {least:g} to 1, got {value!r}")
    return value


def whole_blocks(chosen: Tensor, size: int) -> Tensor:
    """Keys of chosen blocks, for all queries of a tile: bool ``[heads, 1, blocks * size]``."""
    return chosen.repeat_interleave(size, dim=-1)[:, None]


def mean_of_blocks(x: Tensor, size: int) -> Tensor:
    """Means of blocks, of what there is of the last.

    Args:
        x: ``[heads, n, head_dim]``.

    Returns:
        ``[heads, blocks, head_dim]``.
    """
    padded = pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size)).sum(2)
    starts = torch.arange(0, x.shape[1], size, device=x.device)
    return padded / (x.shape[1] - starts).clamp(max=size)[:, None]


def _ordered(mass: Tensor, certain: Tensor) -> Tensor:
    """Places by falling mass, those of certain blocks first."""
    firm = mass.nan_to_num(nan=0.0).masked_fill(certain, torch.inf)
    return firm.sort(dim=-1, descending=True, stable=True).indices


def most(mass: Tensor, certain: Tensor, count: int) -> Tensor:
    """`count` blocks, certain ones first, then by mass: bool like ``mass [..., blocks]``."""
    marks = torch.zeros_like(mass, dtype=torch.bool)
    return marks.scatter_(-1, _ordered(mass, certain)[..., :count], True)


def covering(mass: Tensor, certain: Tensor, wanted: float) -> Tensor:
    """The fewest blocks, certain ones among them, with a share of all mass: bool like `mass`."""
    if wanted >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    order = _ordered(mass, certain)
    # Shares are close to each other, and sums in fp32 are not.
    sorted_mass = mass.nan_to_num(nan=0.0).double().gather(-1, order)
    before = sorted_mass.cumsum(-1) - sorted_mass
    needed = before < wanted * sorted_mass.sum(-1, keepdim=True)
    return torch.zeros_like(needed).scatter_(-1, order, needed) | certain
