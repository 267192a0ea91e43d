"""Blocks of stochastic attention: queries that are neighbours in the order of slots, and the band
of keys around each block, of all layers in two launches and two sorts.

The torch twin, which one layer of `banded` runs on, is `slot_tiles.ring_tiles`.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from sa_patch.kernels.tiling import whole_vectors
from sa_patch.kernels.triton.rings.draws import flat_grid, orders
from sa_patch.kernels.triton.softmax import UNSEEN
from sa_patch.patterns import SA


@triton.jit(
    do_not_specialize=["seq_len", "blocks", "block", "width", "band", "reach", "turns", "total"]
)
def band_kernel(
    order: tl.tensor,
    bands: tl.tensor,
    seq_len: tl.tensor,
    blocks: tl.tensor,
    block: tl.tensor,
    width: tl.tensor,
    band: tl.tensor,
    reach: tl.tensor,
    turns: tl.tensor,
    total: tl.tensor,
    CIRCULAR: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    """The positions of each block's band, and behind them those of its queries, beyond all keys.

    Args:
        order: int64 ``[draws, seq_len]``, the position in every slot.
        bands: int32 ``[draws * blocks, width + block]``: keys, `seq_len` where there is none, then
            queries with ``seq_len + 1`` added, so that sorting keeps them behind.
        turns: what makes the first slot of all bands 0 or more: a multiple of `seq_len`.
    """
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    row = place // (width + block)
    column = place - row * (width + block)
    draw = row // blocks
    queries = column >= width
    slot = (row - draw * blocks) * block + tl.where(queries, column - width, column - reach)
    real = tl.where(queries, slot < seq_len, column < band)
    if not CIRCULAR:
        real = real & (slot >= 0) & (slot < seq_len)
    real = real & (place < total)
    position = tl.load(order + draw * seq_len + (slot + turns) % seq_len, mask=real, other=seq_len)
    position += tl.where(queries, seq_len + 1, 0)
    tl.store(bands + place, position.to(tl.int32), mask=place < total)


@triton.jit(
    do_not_specialize=["seq_len", "block", "width", "reach", "sinks", "half", "rounds", "total"]
)
def limit_kernel(
    bands: tl.tensor,
    columns: tl.tensor,
    lows: tl.tensor,
    queries: tl.tensor,
    query_steps: tl.tensor,
    windows: tl.tensor,
    keys: tl.tensor,
    key_steps: tl.tensor,
    counts: tl.tensor,
    skips: tl.tensor,
    seq_len: tl.tensor,
    block: tl.tensor,
    width: tl.tensor,
    reach: tl.tensor,
    sinks: tl.tensor,
    half: tl.tensor,
    rounds: tl.tensor,
    total: tl.tensor,
    LIMITED: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    """What `RingPlan` holds, of bands that are sorted.

    Args:
        bands: of `band_kernel`, each row ascending.
        columns: int64, like `bands`: where each entry stood.
        lows, sinks: of `LocalWindow`; lows are read where they are LIMITED by more than causality.
        half, rounds: the largest power of two in `width`, and how often 2 divides twice that.
    """
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < total
    row = place // (width + block)
    column = (place - row * (width + block)).to(tl.int32)
    is_query = inside & (column >= width)
    is_key = inside & (column < width)
    position = tl.load(bands + place, mask=inside, other=0)
    step = tl.load(columns + place, mask=inside, other=0).to(tl.int32)
    of_key = row * width + column
    tl.store(keys + of_key, position, mask=is_key)
    tl.store(key_steps + of_key, step, mask=is_key)
    of_query = row * block + (column - width)
    position -= seq_len + 1
    tl.store(queries + of_query, position, mask=is_query)
    tl.store(query_steps + of_query, step - width, mask=is_query)
    tl.store(windows + of_query, tl.zeros_like(step) + (2 * reach + 1), mask=is_query)
    if LIMITED:
        limit = tl.load(lows + position, mask=is_query, other=sinks)
    else:
        limit = tl.where(is_query, position + 1, sinks)
    # How many keys of the row are below the limit; the first key's place counts the sinks.
    first = inside & (column == 0)
    counted = is_query | first
    before = bands + row * (width + block) - 1
    found = tl.zeros_like(step)
    for _ in range(0, rounds):
        count = found + half
        key = tl.load(before + count, mask=counted & (count <= width), other=UNSEEN)
        found = tl.where(key < limit, count, found)
        half = half // 2
    tl.store(counts + of_query, found, mask=is_query)
    tl.store(skips + row, found, mask=first)


def blocks_of(
    pattern: SA,
    seq_len: int,
    lows: Tensor | None,
    sinks: int,
    *,
    layers: range,
    heads: int,
    block: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """What `RingPlan` holds, in its order, of whole sequences.

    Args:
        lows, sinks: of `LocalWindow`; no lows where nothing but causality limits a query.
    """
    reach = pattern.window - 1
    band = block + 2 * reach
    width = whole_vectors(band)
    blocks = triton.cdiv(seq_len, block)
    order = orders(pattern, seq_len, layers, heads, device)
    rows = len(layers) * order.shape[1] * blocks
    bands = torch.empty(rows, width + block, dtype=torch.int32, device=device)
    grid, elements = flat_grid(bands.numel())
    turns = triton.cdiv(reach, seq_len) * seq_len
    band_kernel[grid](
        *(order, bands, seq_len, blocks, block, width, band, reach, turns, bands.numel()),
        CIRCULAR=pattern.circular,
        ELEMENTS=elements,
        num_warps=4,
    )
    # A ring shorter than the band repeats positions; stable, so that every run agrees.
    bands, columns = bands.sort(dim=-1, stable=True)
    parts = _in_one_piece(
        [(rows, block)] * 3 + [(rows, width)] * 2 + [(rows, block), (rows,)], device
    )
    rounds = width.bit_length()
    limit_kernel[grid](
        *(bands, columns, lows, *parts, seq_len, block, width, reach, sinks),
        *(1 << rounds - 1, rounds, bands.numel()),
        LIMITED=lows is not None,
        ELEMENTS=elements,
        num_warps=4,
    )
    return tuple(parts)


def _in_one_piece(shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """Room for int32 tensors of these shapes."""
    sizes = [prod(shape) for shape in shapes]
    memory = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    return [part.view(shape) for part, shape in zip(memory.split(sizes), shapes, strict=True)]
