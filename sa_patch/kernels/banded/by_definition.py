"""Any pattern by its definition, tile after tile of queries: memory O(n), and n^2 questions.

A tile's mask says which keys some of its queries see. On a CPU these are gathered, so that products
are made for them alone; elsewhere the tile meets all keys so far, since how many there are would
have to be asked of the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.kernels.backend import PLAIN, Softmax, as_scored
from sa_patch.kernels.merge import attend_with_lse
from sa_patch.kernels.tiling import whole_vectors
from sa_patch.patterns import Pattern

# Queries of a tile: more read keys that most of them do not see, fewer make small products.
_TILE = 64
# Above this share of the keys so far, gathering costs more than it saves.
_MOST = 0.6


def attend_by_definition(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    start: int,
    scale: float,
    softmax: Softmax = PLAIN,
) -> Tensor:
    """Attention of queries at ``start .. start + nq - 1`` over what the pattern shows them.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``; rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``, ``n = start + nq``.

    Returns:
        ``[batch, q_heads, nq, head_dim]``.
    """
    shared = pattern.shared_queries
    tile = -(-_TILE // shared) * shared
    seq_len = k.shape[2]
    rows = []
    for row in range(len(q)):
        with torch.no_grad():
            seen = pattern.view(
                seq_len,
                layer=layer,
                heads=q.shape[1],
                q=as_scored(pattern, q[row].detach(), scale),
                k=k[row].detach(),
                start=start,
                device=q.device,
            )
        parts = []
        for low in range(start, seq_len, tile):
            high = min(low + tile, seq_len)
            with torch.no_grad():
                mask = seen(low, high)
            queries = q[row, :, low - start : high - start]
            parts.append(_attend_tile(queries, k[row], v[row], mask, scale, softmax).to(q.dtype))
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows)


def _attend_tile(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softmax: Softmax
) -> Tensor:
    """One tile of queries.

    Args:
        q: ``[q_heads, m, head_dim]``.
        k, v: ``[kv_heads, n, head_dim]``.
        seen: bool ``[q_heads or 1, m, end]``.

    Returns:
        ``[q_heads, m, head_dim]``, in fp32 at least.
    """
    end = seen.shape[2]
    if q.device.type == "cpu":
        by_kv_head = seen.any(1).unflatten(0, (min(len(seen), len(k)), -1)).any(1)
        most = whole_vectors(int(by_kv_head.sum(1).max()))
        if most <= _MOST * end:
            # A stable sort keeps the keys in order; what fills up the rows is hidden by the mask.
            places = by_kv_head.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            k, v = (_taken(x, places) for x in (k, v))
            of_heads = places.repeat_interleave(len(seen) // len(places), dim=0)
            seen = seen.gather(2, of_heads[:, None].expand(-1, seen.shape[1], -1))
            end = most
    out, lse = attend_with_lse(
        q[None], k[None, :, :end], v[None, :, :end], seen[None], scale, softcap=softmax.softcap
    )
    return softmax.share(out, lse)[0]


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of ``x [kv_heads, n, head_dim]`` at ``places [kv_heads or 1, m]``."""
    if len(places) == 1:
        return x[:, places[0]]
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
