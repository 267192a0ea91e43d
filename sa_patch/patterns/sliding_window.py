"""Sliding-window attention: the nearest `window` tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.base import Pattern, Profile, Rule, whole_number


@dataclass(frozen=True)
class SWA(Pattern):
    """Query i sees the keys with ``0 <= i - j < window``.

    Args:
        window: number of keys in view, the query's own among them; at least 1.

    Raises:
        UserError: if `window` is not a whole number of at least 1.
    """

    window: int = field(metadata={"always": True})

    name: ClassVar[str] = "swa"
    summary: ClassVar[str] = "sliding window: the nearest w tokens (Beltagy et al., 2004.05150)"

    def __post_init__(self) -> None:
        whole_number(self.window, "window", 1)

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
        behind = query_positions[:, None] - keys
        return ((behind >= 0) & (behind < self.window))[None]

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        return lambda i, j: i - j < self.window

    def profile(self, seq_len: int) -> Profile:
        return Profile(0, self.window, torch.zeros(seq_len, dtype=torch.float64))

    @property
    def bounded_reach(self) -> tuple[int, int] | None:
        return 0, self.window

    def keys_per_query(self, seq_len: int) -> Tensor:
        return torch.arange(1, seq_len + 1, dtype=torch.float64).clamp(max=self.window)

    def saturated(self, seq_len: int) -> bool:
        return self.window >= seq_len

    @property
    def effective_window(self) -> int | None:
        return self.window

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        return torch.arange(1, seq_len + 1).clamp(max=self.window)[None]
