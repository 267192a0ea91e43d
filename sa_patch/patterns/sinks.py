"""Attention sinks: the first tokens of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.base import Pattern, Profile, Rule, whole_number


@dataclass(frozen=True)
class Sinks(Pattern):
    """Query i sees the keys ``j < size``, ``j <= i``: not itself, once it is no sink.

    Pretrained models rest much of their attention on the first tokens (arXiv 2309.17453), so
    that this is a part of unions rather than a pattern of its own.

    Args:
        size: number of first tokens in view, at least 1.

    Raises:
        UserError: if `size` is not a whole number of at least 1.
    """

    size: int = field(default=4, metadata={"always": True})

    name: ClassVar[str] = "sinks"
    summary: ClassVar[str] = "attention sinks: the first tokens (Xiao et al., 2309.17453)"

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
        keys = torch.arange(seq_len, device=query_positions.device)
        return ((keys < self.size) & (keys <= query_positions[:, None]))[None]

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        return lambda i, j: (j < self.size).expand(torch.broadcast_shapes(i.shape, j.shape))

    def profile(self, seq_len: int) -> Profile:
        return Profile(self.size, 0, torch.zeros(seq_len, dtype=torch.float64))

    @property
    def bounded_reach(self) -> tuple[int, int] | None:
        return self.size, 0

    def keys_per_query(self, seq_len: int) -> Tensor:
        return self.count_visible(seq_len)[0].double()

    def saturated(self, seq_len: int) -> bool:
        return self.size >= seq_len

    @property
    def effective_window(self) -> int | None:
        return self.size

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        return torch.arange(1, seq_len + 1).clamp(max=self.size)[None]
