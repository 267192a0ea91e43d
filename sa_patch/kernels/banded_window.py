"""Sliding windows in pure torch: tiles of queries against the overlapping bands of keys.

The bands are views of the keys (`Tensor.unfold`), so nothing is copied; one mask serves all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.rows import RowWriter

# Matrix products over a number of keys that is no multiple of this are a fifth slower on CPUs.
_KEY_MULTIPLE = 16
# Queries that share a band. Measured on two cores for windows of 16 to 1,024: a larger tile
# computes more that no query sees, a smaller one makes the matrix products slow.
_TILE = 32
# Scores of one call: enough to fill the threads, few enough to stay in the caches.
_SCORES = 1 << 20


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, *, start: int, window: int, scale: float
) -> Tensor:
    """Attention of queries at ``start + 0 .. start + nq - 1`` over their nearest `window` keys.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``, ``n >= start + nq``.

    Returns:
        ``[batch, q_heads, nq, head_dim]``. Beyond the output it holds O(w) at a time.
    """
    width = -(-(_TILE + window - 1) // _KEY_MULTIPLE) * _KEY_MULTIPLE
    queries = q.shape[2]
    out = RowWriter(q, k, v)
    # Queries before `window` see all that came before them.
    dense = min(queries, max(0, window - start))
    # The first tile whose band does not begin before the first key, and the end of the last.
    first = min(queries, max(dense, width - _TILE - start))
    last = first + (queries - first) // _TILE * _TILE
    if dense:
        _dense(out, q[:, :, :dense], k, v, start=start, scale=scale)
    for low, high in _ranges(dense, first) + _ranges(last, queries):
        tile = q[:, :, low:high]
        band = slice(max(0, start + low - window + 1), start + high)
        mask = _seen(len(tile[0, 0]), band.stop - band.start, window, q.device)
        out.write(_sdpa(tile, k[:, :, band], v[:, :, band], mask, scale), low)
    if last > first:
        bands = slice(start + first + _TILE - width, start + last)
        k_bands, v_bands = (x[:, :, bands].unfold(2, width, _TILE) for x in (k, v))
        _whole_tiles(
            out, q[:, :, first:last], k_bands, v_bands, first=first, window=window, scale=scale
        )
    return out.result()


def _ranges(low: int, high: int) -> list[tuple[int, int]]:
    return [(first, min(first + _TILE, high)) for first in range(low, high, _TILE)]


def _seen(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """bool ``[queries, keys]``: the window, where the last key is the last query's own."""
    rows = torch.arange(queries, device=device)[:, None] + keys - queries
    behind = rows - torch.arange(keys, device=device)
    return (behind >= 0) & (behind < window)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _dense(out: RowWriter, q: Tensor, k: Tensor, v: Tensor, *, start: int, scale: float) -> None:
    """Queries at ``start .. start + nq - 1`` over all keys up to their own."""
    end = start + q.shape[2]
    k, v = k[:, :, :end], v[:, :, :end]
    if start == 0:
        part = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.write(part, 0)
        return
    step = max(_TILE, _SCORES // (q.shape[1] * end))
    for low in range(0, q.shape[2], step):
        tile = q[:, :, low : low + step]
        seen = start + low + tile.shape[2]
        mask = _seen(tile.shape[2], seen, seen, q.device)
        out.write(_sdpa(tile, k[:, :, :seen], v[:, :, :seen], mask, scale), low)


def _whole_tiles(
    out: RowWriter,
    q: Tensor,
    k_bands: Tensor,
    v_bands: Tensor,
    *,
    first: int,
    window: int,
    scale: float,
) -> None:
    """Tiles of `_TILE` queries, several to a call.

    Args:
        q: ``[batch, q_heads, tiles * _TILE, head_dim]``, written from query `first` on.
        k_bands, v_bands: ``[batch, kv_heads, tiles, head_dim, width]``; a band ends with its
            tile's last query.
    """
    tiles, width = k_bands.shape[2], k_bands.shape[4]
    seen = _seen(_TILE, width, window, q.device)
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    # Every tile of a row is a problem of its own: [batch, tiles, heads, ., head_dim].
    q_tiles = q.unflatten(2, (tiles, _TILE)).transpose(1, 2)
    k_tiles, v_tiles = (x.permute(0, 2, 1, 4, 3) for x in (k_bands, v_bands))
    step = max(1, _SCORES // (q.shape[0] * q.shape[1] * _TILE * width))
    for low in range(0, tiles, step):
        group = slice(low, low + step)
        # A batch of one stays a view.
        q_fold, k_fold, v_fold = (x[:, group].flatten(0, 1) for x in (q_tiles, k_tiles, v_tiles))
        part = _sdpa(q_fold, k_fold, v_fold, bias, scale).unflatten(0, (q.shape[0], -1))
        out.write(part.transpose(1, 2).flatten(2, 3), first + low * _TILE)
