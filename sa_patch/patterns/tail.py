"""A dense tail: the last queries of a prompt see everything before them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.base import Pattern, Profile, Rule, whole_number


@dataclass(frozen=True)
class Tail(Pattern):
    """The last `size` queries see every key ``j <= i``, all others their own key alone.

    A part of unions. A prompt ends with what is asked of it, and the queries there are the ones
    that must reach everywhere; so few of them cost little, ``size * n`` pairs in all. It is the
    prefill's share of what ``decode="full"`` does for generated tokens. The dense bottom rows of
    the triangle-shaped attention of arXiv 2507.21526. It is not prefix-stable: which queries are
    the last depends on n.

    Args:
        size: number of last queries, at least 1.

    Raises:
        UserError: if `size` is not a whole number of at least 1.
    """

    size: int = field(default=64, metadata={"always": True})

    name: ClassVar[str] = "tail"
    summary: ClassVar[str] = "the last queries of a prompt see everything (He et al., 2507.21526)"
    prefix_stable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole_number(self.size, "size", 1)

    def visible(
        self,
        query_positions: Tensor,
        seq_len: int,
        *,
        layer: int = 0,
        heads: int = 1,
        q: Tensor | None = None,
        k: Tensor | None = None,
    ) -> Tensor:
        keys = torch.arange(seq_len, device=query_positions.device)[None, None]
        i = query_positions[None, :, None]
        return self.rule(seq_len)(i, keys) & (keys <= i)

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        first = seq_len - self.size
        return lambda i, j: (i >= first) | (i == j)

    def profile(self, seq_len: int) -> Profile:
        return Profile(0, 1, (torch.arange(seq_len) >= seq_len - self.size).double())

    def keys_per_query(self, seq_len: int) -> Tensor:
        return self.count_visible(seq_len)[0].double()

    def saturated(self, seq_len: int) -> bool:
        # The first query sees all there is to see as it is.
        return self.size >= seq_len - 1

    def dense_end(self, seq_len: int) -> int:
        return min(self.size, seq_len)

    @property
    def effective_window(self) -> int | None:
        """What it adds to the window of the other queries: nothing."""
        return 0

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        i = torch.arange(seq_len)
        return (i + 1).where(i >= seq_len - self.size, 1)[None]
