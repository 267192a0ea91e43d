"""The one signature that every backend shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sa_patch.patterns import Pattern


@dataclass(frozen=True)
class Spans:
    """Where the rows of a batch lie: right-padded, with plain integers so that no kernel syncs.

    Args:
        lengths: real tokens of each row, at most the keys' n.
        starts: position of each row's first query; 0 in prefill. Queries of row b stand at
            ``starts[b] + 0 .. starts[b] + nq - 1``; those at or beyond ``lengths[b]`` are padding.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    def groups(self) -> dict[tuple[int, int], list[int]]:
        """Rows that share their (length, start), and so their positions and permutations."""
        rows: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self.lengths, self.starts, strict=True)):
            rows.setdefault(key, []).append(row)
        return rows

    def padded_queries(self, query_len: int, device: torch.device) -> Tensor | None:
        """bool ``[batch, nq]``, True at padding queries; None where there are none."""
        real = [n - start for n, start in zip(self.lengths, self.starts, strict=True)]
        if min(real) >= query_len:
            return None
        return torch.arange(query_len, device=device) >= torch.tensor(real, device=device)[:, None]

    def padded_keys(self, key_len: int, device: torch.device) -> Tensor | None:
        """bool ``[batch, n]``, True at padding keys; None where there are none."""
        if min(self.lengths) >= key_len:
            return None
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(key_len, device=device) >= lengths[:, None]


class Attend(Protocol):
    """Attention of `q` over the keys that `pattern` makes visible.

    Shapes: q ``[batch, q_heads, nq, head_dim]``, k and v ``[batch, kv_heads, n, head_dim]``,
    result as q. Inputs are finite everywhere; what is returned at padding queries is ignored.
    """

    def __call__(
        self,
        pattern: Pattern,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int,
        spans: Spans,
        scale: float,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a pattern."""

    name: str
    summary: str
    supports: Callable[[Pattern, Tensor, Tensor], tuple[bool, str]]
    """``supports(pattern, q, k) -> (ok, reason)``; the reason is empty where it is able."""
    attend: Attend
