"""First tokens and sliding windows in pure torch: tiles of queries against overlapping bands.

Without sinks the bands are views of the keys (`Tensor.unfold`), so nothing is copied; one mask
serves all tiles that see alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.kernels.banded.outputs import OutputWriter
from sa_patch.kernels.local_window import LocalWindow, Run
from sa_patch.kernels.merge import hidden_score
from sa_patch.kernels.tiling import tile_rows, whole_vectors

# Scores of one call: enough to fill the threads, few enough to stay in the caches.
_SCORES = 1 << 20


def attend_local_window(
    local_window: LocalWindow,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    scale: float,
    sums: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries at ``start .. start + nq - 1`` over sinks and their neighbourhood.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``, ``n >= start + nq``.
        sums: whether to return the log-sum-exps too; without, every query must see a key.
        softcap: of `Softmax`; goes with sums.

    Returns:
        Output like q and log-sum-exps ``[batch, q_heads, nq]``. Beyond these it holds O(w) at a
        time.
    """
    tile, queries = tile_rows(q.dtype), q.shape[2]
    out = OutputWriter(q, k, v, scale=scale, sums=sums, softcap=softcap)
    dense = min(queries, max(0, local_window.all_seen(start + queries) - start))
    if dense:
        _dense(local_window, out, q[:, :, :dense], k, v, start=start)
    if local_window.reach < 0:
        _sinks_alone(local_window, out, q, k, v, low=dense)
        return out.result()
    width = whole_vectors(local_window.sinks + tile + local_window.reach) - local_window.sinks
    # The first tile whose band does not begin before the last sink, and the end of the last tile.
    first = max(dense, local_window.sinks + width - tile - start)
    first = min(queries, first + local_window.until_aligned(start + first, tile))
    last = first + (queries - first) // tile * tile
    for low in (*range(dense, first, tile), *range(last, queries, tile)):
        high = min(low + tile, first if low < first else queries)
        _tile(local_window, out, q, k, v, start=start, low=low, high=high)
    if last > first:
        tiles = first, last
        for run in local_window.runs(start + first, tile, width):
            _whole_tiles(local_window, out, q, k, v, start=start, run=run, tiles=tiles)
    return out.result()


def _bias(local_window: LocalWindow, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, like q: for positions that broadcast against each other."""
    hidden = ~local_window.sees(queries, keys) | (keys > queries)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, hidden_score(dtype))


def _dense(
    local_window: LocalWindow, out: OutputWriter, q: Tensor, k: Tensor, v: Tensor, *, start: int
) -> None:
    """The first queries, which see all keys up to their own."""
    end = start + q.shape[2]
    if start == 0:
        out.write(out.attend(q, k[:, :, :end], v[:, :, :end], None, causal=True), 0)
        return
    step = max(1, _SCORES // (q.shape[1] * end))
    for low in range(0, q.shape[2], step):
        high = min(low + step, q.shape[2])
        keys = torch.arange(start + high, device=q.device)
        rows = torch.arange(start + low, start + high, device=q.device)[:, None]
        bias = _bias(local_window, rows, keys, q.dtype)
        seen = slice(0, start + high)
        out.write(out.attend(q[:, :, low:high], k[:, :, seen], v[:, :, seen], bias), low)


def _sinks_alone(
    local_window: LocalWindow, out: OutputWriter, q: Tensor, k: Tensor, v: Tensor, low: int
) -> None:
    """Queries from `low` on, all of them behind the sinks."""
    if low == q.shape[2]:
        return
    if not local_window.sinks:
        out.nothing(low, q.shape[2])
        return
    step = max(1, _SCORES // (q.shape[1] * local_window.sinks))
    k, v = k[:, :, : local_window.sinks], v[:, :, : local_window.sinks]
    for first in range(low, q.shape[2], step):
        out.write(out.attend(q[:, :, first : first + step], k, v, None), first)


def _tile(
    local_window: LocalWindow,
    out: OutputWriter,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    low: int,
    high: int,
) -> None:
    """Queries ``low .. high - 1`` against the keys that some of them see."""
    rows = torch.arange(start + low, start + high, device=q.device)
    begin = max(local_window.sinks, int(local_window.first(rows[:1])))
    keys = torch.arange(begin, start + high, device=q.device)
    band = slice(begin, start + high)
    if begin > local_window.sinks > 0:
        keys = torch.cat([torch.arange(local_window.sinks, device=q.device), keys])
        k, v = (torch.cat([x[:, :, : local_window.sinks], x[:, :, band]], dim=2) for x in (k, v))
    else:
        band = slice(0 if local_window.sinks else begin, start + high)
        keys = torch.arange(band.start, band.stop, device=q.device)
        k, v = k[:, :, band], v[:, :, band]
    out.write(
        out.attend(q[:, :, low:high], k, v, _bias(local_window, rows[:, None], keys, q.dtype)), low
    )


def _whole_tiles(
    local_window: LocalWindow,
    out: OutputWriter,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    run: Run,
    tiles: tuple[int, int],
) -> None:
    """A run of the tiles of queries ``tiles[0] .. tiles[1] - 1``, several to a call.

    A band is the `width` keys that end with its tile's last query.
    """
    tile, heads = tile_rows(q.dtype), q.shape[1]
    first, last = tiles[0] + run.skipped * tile, tiles[1]
    if first >= last:
        return
    count = -(-(last - first) // (run.stride * tile))
    bands = slice(start + first + tile - run.width, start + last)
    # Every tile of a row is a problem of its own: [batch, tiles, heads, ., head_dim].
    q_tiles = q[:, :, first:last].unflatten(2, (-1, tile)).transpose(1, 2)[:, :: run.stride]
    k_tiles, v_tiles = (
        x[:, :, bands].unfold(2, run.width, run.stride * tile).permute(0, 2, 1, 4, 3)
        for x in (k, v)
    )
    step = max(1, _SCORES // (heads * tile * (local_window.sinks + run.width)))
    same = _tiles_bias(local_window, start + first, 1, run.width, q) if run.alike else None
    for low in range(0, count, step):
        group = slice(low, min(low + step, count))
        begin = first + low * run.stride * tile
        bias = same
        if bias is None:
            bias = _tiles_bias(local_window, start + begin, group.stop - low, run.width, q)
        # Row by row: the overlapping bands of several rows could not be one view.
        parts = []
        for row, (q_row, k_row, v_row) in enumerate(zip(q_tiles, k_tiles, v_tiles, strict=True)):
            k_band = _behind_sinks(k_row[group], k[row], local_window.sinks)
            v_band = _behind_sinks(v_row[group], v[row], local_window.sinks)
            parts.append(out.attend(q_row[group], k_band, v_band, bias))
        out.write_tiles(parts, begin, run.stride)


def _tiles_bias(
    local_window: LocalWindow, low: int, count: int, width: int, like: Tensor
) -> Tensor:
    """``[tiles, 1, tile, sinks + width]`` for tiles of queries from position `low` on."""
    tile = tile_rows(like.dtype)
    begins = low + torch.arange(count, device=like.device)[:, None, None, None] * tile
    rows = begins + torch.arange(tile, device=like.device)[:, None]
    band = begins + tile - width + torch.arange(width, device=like.device)
    sinks = torch.arange(local_window.sinks, device=like.device).expand(count, 1, 1, -1)
    return _bias(local_window, rows, torch.cat([sinks, band], dim=-1), like.dtype)


def _behind_sinks(bands: Tensor, x: Tensor, sinks: int) -> Tensor:
    """``bands [tiles, kv_heads, width, head_dim]``, each behind the sinks of ``x [kv_heads, n,
    head_dim]``."""
    if not sinks:
        return bands
    return torch.cat([x[:, :sinks].expand(len(bands), -1, -1, -1), bands], dim=2)
