"""Sliding windows in pure torch: tiles of queries against the overlapping bands of keys.

The bands are views of the keys (`Tensor.unfold`), so nothing is copied; one mask serves all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.rows import RowWriter, tile_rows, whole_vectors

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
    tile, queries = tile_rows(q.dtype), q.shape[2]
    width = whole_vectors(tile + window - 1)
    out = RowWriter(q, k, v)
    # Queries before `window` see all that came before them.
    dense = min(queries, max(0, window - start))
    # The first tile whose band does not begin before the first key, and the end of the last.
    first = min(queries, max(dense, width - tile - start))
    last = first + (queries - first) // tile * tile
    if dense:
        _dense(out, q[:, :, :dense], k, v, start=start, scale=scale)
    for low in (*range(dense, first, tile), *range(last, queries, tile)):
        high = min(low + tile, first if low < first else queries)
        band = slice(max(0, start + low - window + 1), start + high)
        mask = _seen(high - low, band.stop - band.start, window, q.device)
        out.write(_sdpa(q[:, :, low:high], k[:, :, band], v[:, :, band], mask, scale), low)
    if last > first:
        bands = slice(start + first + tile - width, start + last)
        k_bands, v_bands = (x[:, :, bands].unfold(2, width, tile) for x in (k, v))
        _whole_tiles(
            out, q[:, :, first:last], k_bands, v_bands, first=first, window=window, scale=scale
        )
    return out.result()


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
    step = max(1, _SCORES // (q.shape[1] * end))
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
    """Whole tiles of queries, several to a call.

    Args:
        q: ``[batch, q_heads, tiles * tile, head_dim]``, written from query `first` on.
        k_bands, v_bands: ``[batch, kv_heads, tiles, head_dim, width]``; a band ends with its
            tile's last query.
    """
    heads, queries = q.shape[1:3]
    tiles, width = k_bands.shape[2], k_bands.shape[4]
    tile = queries // tiles
    seen = _seen(tile, width, window, q.device)
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    # Every tile of a row is a problem of its own: [batch, tiles, heads, ., head_dim].
    q_tiles = q.unflatten(2, (tiles, tile)).transpose(1, 2)
    k_tiles, v_tiles = (x.permute(0, 2, 1, 4, 3) for x in (k_bands, v_bands))
    step = max(1, _SCORES // (heads * tile * width))
    for low in range(0, tiles, step):
        group = slice(low, low + step)
        # Row by row: the overlapping bands of several rows could not be one view.
        parts = [
            _sdpa(q_row[group], k_row[group], v_row[group], bias, scale)[None]
            for q_row, k_row, v_row in zip(q_tiles, k_tiles, v_tiles, strict=True)
        ]
        part = parts[0] if len(parts) == 1 else torch.cat(parts)
        out.write(part.transpose(1, 2).flatten(2, 3), first + low * tile)
