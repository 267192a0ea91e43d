"""What methods share that choose keys for tiles of queries, by all queries of a tile or prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns.base import Pattern, View

Chooser = Callable[[int], Tensor]
"""``choose(tile)``: the keys that a tile's queries may see, bool ``[q_heads, m or 1, keys]``, m the
tile's queries; causality is added, and keys behind those that are told of are not seen."""


@dataclass(frozen=True)
class WholePrompt(Pattern):
    """A pattern whose choices look ahead: within a tile of queries, or to the end of the prompt.

    A method of this kind tells how many queries a tile has, and what each chooses.
    """

    prefix_stable: ClassVar[bool] = False
    reads_content: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    @property
    @abstractmethod
    def tile(self) -> int:
        """Queries of a tile, which are counted from position 0 on."""

    @abstractmethod
    def chooser(self, q: Tensor, k: Tensor) -> Chooser:
        """The choices of one prompt.

        Args:
            q: fp32 ``[q_heads, n, head_dim]``.
            k: fp32 ``[kv_heads, n, head_dim]``.
        """

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
        if not len(query_positions):
            return torch.zeros(1, 0, seq_len, dtype=torch.bool, device=query_positions.device)
        seen = self.view(seq_len, layer=layer, heads=heads, q=q, k=k)
        tiles = query_positions // self.tile
        rows = query_positions.new_empty(heads, 0, seq_len, dtype=torch.bool)
        place = torch.empty_like(query_positions)
        for tile in tiles.unique().tolist():
            mine = tiles == tile
            place[mine] = rows.shape[1] + torch.arange(int(mine.sum()), device=place.device)
            low = tile * self.tile
            of_tile = seen(low, min(low + self.tile, seq_len))[:, query_positions[mine] - low]
            of_tile = torch.nn.functional.pad(of_tile, (0, seq_len - of_tile.shape[2]))
            rows = torch.cat([rows.expand(len(of_tile), -1, -1), of_tile], dim=1)
        return rows[:, place]

    @torch.no_grad()
    def view(
        self,
        seq_len: int,
        *,
        layer: int = 0,
        heads: int = 1,
        q: Tensor | None = None,
        k: Tensor | None = None,
        start: int = 0,
        device: torch.device | None = None,
    ) -> View:
        if q is None or k is None:
            raise UserError(f"{self.name} chooses keys by content: it needs q and k")
        if start or q.shape[1] != seq_len:
            raise UserError(
                f"{self.name} chooses keys by all queries of a prompt: give the {seq_len} queries "
                f"from position 0 on, got {q.shape[1]} from position {start} on"
            )
        choose = self.chooser(q.float(), k.float())
        keys = torch.arange(seq_len, device=q.device)

        @torch.no_grad()
        def seen(low: int, high: int) -> Tensor:
            parts = []
            for tile in range(low // self.tile, -(-high // self.tile)):
                first = max(low, tile * self.tile)
                last = min(high, (tile + 1) * self.tile)
                chosen = choose(tile)
                if chosen.shape[1] > 1:
                    chosen = chosen[:, first - tile * self.tile : last - tile * self.tile]
                queries = torch.arange(first, last, device=q.device)
                width = min(chosen.shape[2], last)
                shown = chosen[..., :width] & (keys[:width] <= queries[:, None])
                parts.append(torch.nn.functional.pad(shown, (0, high - width)))
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

        return seen

    @property
    def counts_need_content(self) -> bool:
        return True

    def count_visible(self, seq_len: int, *, layer: int = 0, heads: int = 1) -> Tensor:
        raise UserError(f"what {self} sees can only be counted where its keys are chosen")


@dataclass(frozen=True)
class Thresholded(WholePrompt):
    """A pattern under a threshold: how many keys it shows is known only where it is run."""

    @property
    def keys_are_bounds(self) -> bool:
        return True

    def keys_per_query(self, seq_len: int) -> Tensor:
        """The most that may be seen: every key so far."""
        return torch.arange(1, seq_len + 1, dtype=torch.float64)

    @property
    def effective_window(self) -> int | None:
        """None: the text decides."""
        return None


def per_query_head(k: Tensor, q: Tensor) -> Tensor:
    """Something of KV heads ``[kv_heads, ...]`` for each query head of ``q [q_heads, ...]``."""
    return k.repeat_interleave(len(q) // len(k), dim=0)


def causal_scores(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Scaled scores of queries that begin at position `first`, -inf for later keys.

    Scores are scaled by ``head_dim ** -0.5``; for a layer with another scale kernels scale q.

    Args:
        q: ``[q_heads, m, head_dim]``.
        k: ``[kv_heads, n, head_dim]``.

    Returns:
        ``[q_heads, m, first + m]``, or fewer keys if there are no more.
    """
    keys = k[:, : first + q.shape[1]]
    # The query heads of a KV head as rows of one product, for which no key is copied.
    rows = (q * q.shape[2] ** -0.5).unflatten(0, (len(k), -1)).flatten(1, 2)
    scores = (rows @ keys.mT).view(*q.shape[:2], keys.shape[1])
    i = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
    later = torch.arange(keys.shape[1], device=q.device) > i
    return scores.masked_fill_(later, -torch.inf)


def by_distance(weights: Tensor, first: int) -> Tensor:
    """Weights of queries from position `first` on, summed by their distance to the key.

    Args:
        weights: ``[q_heads, m, n]``, 0 for later keys.

    Returns:
        ``[q_heads, n]``.
    """
    n = weights.shape[2]
    keys_back = torch.arange(first, n, device=weights.device)[:, None] - torch.arange(
        n, device=weights.device
    )
    back = weights.gather(2, keys_back.clamp(min=0).expand(len(weights), -1, -1))
    return back.masked_fill_(keys_back < 0, 0).sum(1)
