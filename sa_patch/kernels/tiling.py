"""Rows of tokens on their way into tiles and out of them again."""

from __future__ import annotations

import torch
from torch import Tensor

# Matrix products over a number of keys that is no multiple of this are a fifth slower on CPUs.
_KEY_MULTIPLE = 16


def whole_vectors(keys: int) -> int:
    """A number of keys rounded up to what matrix products take whole."""
    return -(-keys // _KEY_MULTIPLE) * _KEY_MULTIPLE


def tile_rows(dtype: torch.dtype) -> int:
    """Queries of a tile, which meet the same keys.

    Larger tiles compute more that no query sees, smaller ones make the matrix products slow.
    Measured on two cores for windows of 32 to 1,024: 32 was fastest or within 5 % in fp32; 64 in
    bf16, whose matrix units want more rows.
    """
    return 32 if dtype.itemsize >= 4 else 64


def queries_at_once(of_a_query: int, held: int, shared: int) -> int:
    """How many queries go together where what they choose is held: whole tiles, one at least.

    Args:
        of_a_query: numbers that a query's choices take, of all its heads and rows of the batch.
        held: numbers that may be held at once.
        shared: queries of a tile.
    """
    return max(1, held // max(1, of_a_query * shared)) * shared


def needs_gradients(*inputs: Tensor) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


class RowWriter:
    """The output of attention over ``q [batch, q_heads, nq, head_dim]``, written tile by tile.

    Without gradients each tile goes to its place at once, so that no second copy of the output
    is ever held. With gradients the tiles are kept and joined in `result`: writing in place
    would make every backward step copy the whole output.

    Memory is laid out ``[batch, nq, q_heads, head_dim]``, as models want it next.

    Args:
        inputs: what else may need gradients.
        dtype: of the output; q's unless given.
    """

    def __init__(self, q: Tensor, *inputs: Tensor, dtype: torch.dtype | None = None):
        self.dtype = dtype or q.dtype
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        if needs_gradients(q, *inputs):
            self._kept = []
        batch, heads, queries, head_dim = q.shape
        self._out = q.new_empty(batch, queries, heads, head_dim, dtype=self.dtype)

    def write(self, rows: Tensor, low: int) -> None:
        """Queries ``low .. low + m - 1``: ``[batch, q_heads, m, head_dim]``."""
        if self._kept is None:
            self._out[:, low : low + rows.shape[2]] = rows.transpose(1, 2)
        else:
            places = torch.arange(low, low + rows.shape[2], device=rows.device)
            self._kept.append((places[None], rows.transpose(1, 2)))

    def scatter(self, rows: Tensor, places: Tensor) -> None:
        """Queries at ``places [draws, m]``: ``[batch, q_heads, m, head_dim]``.

        A single draw places all heads alike; otherwise there is one for each.
        """
        by_rows = rows.transpose(1, 2)
        if self._kept is not None:
            self._kept.append((places, by_rows))
        elif len(places) == 1:
            self._out.index_copy_(1, places[0].long(), by_rows)
        else:
            self._out.scatter_(1, _spread(places, rows), by_rows)

    def result(self) -> Tensor:
        """The output, ``[batch, q_heads, nq, head_dim]``; every query must have been written."""
        if self._kept is None:
            return self._out.transpose(1, 2)
        draws = max(len(where) for where, _ in self._kept)
        places = torch.cat([where.expand(draws, -1) for where, _ in self._kept], dim=1)
        rows = torch.cat([part for _, part in self._kept], dim=1)
        order = places.argsort(dim=1)
        if len(order) == 1:
            return rows.index_select(1, order[0]).transpose(1, 2)
        return rows.gather(1, _spread(order, rows.transpose(1, 2))).transpose(1, 2)


def _spread(places: Tensor, rows: Tensor) -> Tensor:
    """Index ``[batch, m, q_heads, head_dim]`` of ``places [q_heads, m]`` for gather and scatter."""
    batch, _, _, head_dim = rows.shape
    return places.long().t()[None, :, :, None].expand(batch, -1, -1, head_dim)


def by_rows(x: Tensor) -> Tensor:
    """``x [batch, heads, n, head_dim]`` with a token's heads side by side in memory.

    Every row is gathered several times, which is three times faster in larger pieces.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def take_rows(x: Tensor, places: Tensor, heads: int) -> Tensor:
    """Rows of ``x [batch, heads or kv_heads, n, head_dim]`` at ``places [draws, m]``.

    One draw serves all heads as they are. With a draw for every query head the result has
    `heads` heads: a KV head's rows differ between its query heads.
    """
    if len(places) == 1:
        side_by_side = x.transpose(1, 2)
        if side_by_side.is_contiguous():
            return side_by_side.index_select(1, places[0]).transpose(1, 2)
        return x.index_select(2, places[0])
    head = torch.arange(heads, device=x.device) // (heads // x.shape[1])
    return x[:, head[:, None], places]
