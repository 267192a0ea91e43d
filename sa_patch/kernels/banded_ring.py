"""Stochastic attention in pure torch: blocks of neighbouring slots, rows sorted by position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.ring_tiles import KEY_MULTIPLE, RingTiles, ring_tiles
from sa_patch.kernels.rows import RowWriter, by_rows, take_rows, tile_rows
from sa_patch.patterns import SA

# What a hidden key's score loses at least: so much that its weight is zero, and a power of two, so
# that its products with slots and positions are exact.
_HIDDEN = 2.0**100


def attend_ring(
    pattern: SA, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float
) -> Tensor:
    """Stochastic attention of whole sequences.

    Args:
        q: ``[batch, q_heads, n, head_dim]``, rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        ``[batch, q_heads, n, head_dim]``. Beyond the output it holds a copy of k and v at most,
        and O(w) at a time.
    """
    heads, seq_len = q.shape[1:3]
    tile = tile_rows(q.dtype)
    # A block too large gathers and masks keys that most of its queries cannot reach, one too small
    # has little to gain from being sorted. Measured as the tiles.
    block = min(256, max(tile, 1 << (pattern.window.bit_length() - 1)))
    tiles = ring_tiles(pattern, seq_len, layer=layer, heads=heads, block=block, device=q.device)
    out = RowWriter(q, k, v)
    k, v = by_rows(k), by_rows(v)
    bias = _Bias(tiles, q.dtype)
    queries = tiles.queries.clamp(max=seq_len - 1)
    keys = tiles.keys.clamp(max=seq_len - 1)
    for index, needed in enumerate(_needed_keys(tiles, tile)):
        k_band, v_band = take_rows(k, keys[:, index], heads), take_rows(v, keys[:, index], heads)
        q_block = take_rows(q, queries[:, index], heads)
        real = min(block, seq_len - index * block)
        for low, (earlier, count) in zip(range(0, real, tile), needed, strict=False):
            rows = slice(low, min(low + tile, real))
            part = scaled_dot_product_attention(
                q_block[:, :, rows],
                k_band[:, :, :count],
                v_band[:, :, :count],
                attn_mask=bias.of(index, rows, earlier, count),
                scale=scale,
                enable_gqa=heads != k_band.shape[1],
            )
            out.scatter(part, queries[:, index, rows])
    return out.result()


def _needed_keys(tiles: RingTiles, tile: int) -> list[list[tuple[int, int]]]:
    """Per block and tile: leading keys that all its queries come after, and keys it needs."""
    counts = tiles.counts(tile)
    earliest, latest = counts.amin(0).tolist(), counts.amax(0).tolist()
    return [
        [
            (earlier, -(-count // KEY_MULTIPLE) * KEY_MULTIPLE)
            for earlier, count in zip([0, *low], high, strict=False)
        ]
        for low, high in zip(earliest, latest, strict=True)
    ]


class _Bias:
    """What is added to the scores of a tile: 0 where a key is visible, at most -_HIDDEN else.

    Differences of slots and of positions are clamped, not compared: on CPUs comparisons that
    yield booleans cost several times as much as this arithmetic.
    """

    def __init__(self, tiles: RingTiles, dtype: torch.dtype):
        self._reach = tiles.reach * _HIDDEN
        self._keys = tiles.keys.float() * _HIDDEN
        self._queries = (tiles.queries.float() * _HIDDEN)[..., None]
        self._key_steps = tiles.key_steps.float() * _HIDDEN
        # A query's own slot lies `reach` after the first one that it sees.
        self._centres = ((tiles.query_steps.float() + tiles.reach) * _HIDDEN)[..., None]
        self._dtype = dtype

    def of(self, block: int, rows: slice, earlier: int, count: int) -> Tensor:
        """``[1, draws, rows, count]``; the first `earlier` keys precede all of these queries."""
        distance = self._key_steps[:, block, None, :count] - self._centres[:, block, rows]
        room = self._reach - distance.abs_()
        before = self._queries[:, block, rows] - self._keys[:, block, None, earlier:count]
        later = room[:, :, earlier:]
        torch.minimum(later, before, out=later)
        # Four dimensions: with three, torch falls back from its fused CPU kernel.
        return room.clamp_(max=0).to(self._dtype)[None]
