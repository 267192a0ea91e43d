"""Full causal attention: the baseline every other pattern is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.patterns.base import Pattern, Rule


@dataclass(frozen=True)
class Full(Pattern):
    """Query i sees every key ``j <= i``."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "full causal attention: all j <= i"

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
        return (keys <= query_positions[:, None])[None]

    def rule(
        self, seq_len: int, *, layer: int = 0, heads: int = 1, device: torch.device | None = None
    ) -> Rule:
        return lambda i, j: j <= i

    def keys_per_query(self, seq_len: int) -> Tensor:
        return torch.arange(1, seq_len + 1, dtype=torch.float64)

    def saturated(self, seq_len: int) -> bool:
        return True

    @property
    def effective_window(self) -> int | None:
        return None

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        return torch.arange(1, seq_len + 1)[None]
