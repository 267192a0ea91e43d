"""Stochastic attention in pure torch: blocks of neighbouring slots, rows sorted by position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.slot_tiles import RingTiles, ring_tiles
from sa_patch.kernels.tiling import RowWriter, by_rows, take_rows, tile_rows, whole_vectors
from sa_patch.patterns import SA

# What a hidden key's score loses at least: so much that its weight is zero, and a power of two, so
# that its products with slots and positions are exact.
_HIDDEN = 2.0**100
# Blocks of a single row that go into one call, at most.
_TOGETHER = 8


def attend_ring(
    pattern: SA, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float
) -> Tensor:
    """Stochastic attention of whole sequences.

    Args:
        q: ``[batch, q_heads, n, head_dim]``, rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        ``[batch, q_heads, n, head_dim]``. Beyond the output it holds a copy of k and v at most,
        the O(n) indices of `ring_tiles`, and a few bands at a time.
    """
    batch, heads, seq_len, _ = q.shape
    tile = tile_rows(q.dtype)
    block = _block(pattern.window, tile)
    tiles = ring_tiles(pattern, seq_len, layer=layer, heads=heads, block=block, device=q.device)
    out = RowWriter(q, k, v)
    k, v = by_rows(k), by_rows(v)
    bias = _Bias(tiles, q.dtype)
    queries = tiles.queries.clamp(max=seq_len - 1)
    keys = tiles.keys.clamp(max=seq_len - 1)
    counts = tiles.counts(tile)
    earliest, latest = counts.amin(0).tolist(), counts.amax(0).tolist()
    for blocks in _groups(seq_len, block, tiles.keys.shape[2], batch):
        k_bands, v_bands = (_blocks_of(x, keys[:, blocks], heads) for x in (k, v))
        q_blocks = _blocks_of(q, queries[:, blocks], heads)
        real = min(block, seq_len - blocks.start * block)
        before = 0
        for index, low in enumerate(range(0, real, tile)):
            rows = slice(low, min(low + tile, real))
            needed = max(block_counts[index] for block_counts in latest[blocks])
            count = whole_vectors(needed)
            part = scaled_dot_product_attention(
                q_blocks[:, :, rows],
                k_bands[:, :, :count],
                v_bands[:, :, :count],
                attn_mask=bias.of(blocks, rows, before, count),
                scale=scale,
                enable_gqa=heads != k_bands.shape[1],
            )
            by_row = part.transpose(1, 2).reshape(batch, -1, heads, part.shape[3])
            out.scatter(by_row.transpose(1, 2), queries[:, blocks, rows].flatten(1))
            before = min(block_counts[index] for block_counts in earliest[blocks])
    return out.result()


def _block(window: int, tile: int) -> int:
    """Slots of a block.

    One too large gathers and masks keys that most of its queries cannot reach, one too small has
    little to gain from being sorted; measured as the tiles, for windows of 16 to 1,024. In wide
    windows blocks grow with their bands, so that the indices of all bands stay O(n).
    """
    power = 1 << (window.bit_length() - 1)
    return max(tile, min(128, power), power // 8)


def _groups(seq_len: int, block: int, band: int, batch: int) -> list[slice]:
    """Blocks whose tiles share a call; a last block that is not whole goes alone.

    One block of one row is too little work for threads to share.
    """
    whole = seq_len // block
    # Their bands are copies, which must stay a small part of a short sequence.
    together = min(_TOGETHER, max(1, seq_len * 5 // 4 // band)) if batch == 1 else 1
    groups = [slice(low, min(low + together, whole)) for low in range(0, whole, together)]
    return groups + [slice(whole, whole + 1)] * (seq_len % block > 0)


def _blocks_of(x: Tensor, places: Tensor, heads: int) -> Tensor:
    """Rows of x at ``places [draws, blocks, m]``: ``[batch * blocks, heads, m, head_dim]``."""
    rows = take_rows(x, places.flatten(1), heads).unflatten(2, places.shape[1:])
    return rows.transpose(1, 2).flatten(0, 1)


class _Bias:
    """What is added to the scores of a tile: 0 where a key is visible, at most -_HIDDEN else.

    Differences of slots and of positions are clamped, not compared: on CPUs comparisons that
    yield booleans cost several times as much as this arithmetic.
    """

    def __init__(self, tiles: RingTiles, dtype: torch.dtype):
        # All [blocks, draws, .], as the kernel wants them.
        self._reach = tiles.reach * _HIDDEN
        self._keys = tiles.keys.float().transpose(0, 1) * _HIDDEN
        self._queries = (tiles.queries.float().transpose(0, 1) * _HIDDEN)[..., None]
        self._key_steps = tiles.key_steps.float().transpose(0, 1) * _HIDDEN
        # A query's own slot lies `reach` after the first one that it sees.
        centres = tiles.query_steps.float().transpose(0, 1) + tiles.reach
        self._centres = (centres * _HIDDEN)[..., None]
        self._dtype = dtype

    def of(self, blocks: slice, rows: slice, before: int, count: int) -> Tensor:
        """``[blocks, draws, rows, count]``; the first `before` keys precede all these queries."""
        distance = self._key_steps[blocks, :, None, :count] - self._centres[blocks, :, rows]
        room = self._reach - distance.abs_()
        ahead = self._queries[blocks, :, rows] - self._keys[blocks, :, None, before:count]
        torch.minimum(room[..., before:], ahead, out=room[..., before:])
        # Four dimensions: with three, torch falls back from its fused CPU kernel.
        return room.clamp_(max=0).to(self._dtype)
