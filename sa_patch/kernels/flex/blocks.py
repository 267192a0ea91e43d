"""Which blocks of keys each block of queries needs: the lists that FlexAttention walks.

Everything here is plain torch over block indices. For sinks, windows and slots on a ring the lists
follow from the band alone, O(n w / block^2) entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLists:
    """Blocks of keys by row, a row being one block of queries.

    Args:
        counts: int32 ``[..., rows]``, how many entries of `blocks` are meant.
        blocks: int32 ``[..., rows, width]``, key blocks of which some pairs are visible; the mask
            is tested in them.
        columns: how many blocks the keys make.
        full_counts, full_blocks: the same for key blocks of which all pairs are visible; None
            where there are none to tell apart.
    """

    counts: Tensor
    blocks: Tensor
    columns: int
    full_counts: Tensor | None = None
    full_blocks: Tensor | None = None

    def to(self, device: torch.device) -> BlockLists:
        moved = (None if x is None else x.to(device) for x in (self.full_counts, self.full_blocks))
        return BlockLists(self.counts.to(device), self.blocks.to(device), self.columns, *moved)

    def with_block(self, index: int) -> BlockLists:
        """The lists with a block at `index`, which none of them holds, added to every row."""
        blocks = torch.nn.functional.pad(self.blocks, (0, 1))
        blocks = blocks.scatter(-1, self.counts.long()[..., None], index)
        columns = max(self.columns, index + 1)
        return BlockLists(self.counts + 1, blocks, columns, self.full_counts, self.full_blocks)


def window_blocks(seq_len: int, window: int, block: int, sinks: int = 0) -> BlockLists:
    """The causal band ``0 <= i - j < window`` and the first `sinks` keys, on the CPU."""
    row, last_query = _rows(seq_len, block)
    first = ((row * block - window + 1) // block).clamp(min=0)
    # The first key of a whole block must be in reach of the row's last query.
    first_full = torch.maximum(first, -((window - 1 - last_query) // block)).clamp(max=len(row))
    left = torch.minimum(first_full, row) - first
    before = first.clamp(max=-(-sinks // block))
    counts = before + left + 1
    entry = torch.arange(int(counts.max()))
    in_band = entry - before[:, None]
    partial = torch.where(in_band < left[:, None], first[:, None] + in_band, row[:, None])
    partial = torch.where(in_band < 0, entry, partial)
    full_counts = (row - first_full).clamp(min=0)
    full = first_full[:, None] + torch.arange(max(1, int(full_counts.max())))
    full = full.clamp(max=len(row) - 1)
    return BlockLists(counts.int(), partial.int(), len(row), full_counts.int(), full.int())


def ring_blocks(seq_len: int, reach: int, circular: bool, block: int) -> BlockLists:
    """Slots at most `reach` apart, around the ring where `circular`, on the CPU.

    The order of positions is random in slots, so that causality empties or fills no block.
    """
    row, last_query = _rows(seq_len, block)
    low, high = row * block - reach, last_query + reach
    if circular:
        wraps_below, wraps_above = low < 0, high >= seq_len
        start = torch.where(wraps_below, low + seq_len, low) // block
        end = torch.where(wraps_above, high - seq_len, high) // block
        wraps = (wraps_below | wraps_above).long()
        counts = end - start + 1 + wraps * len(row)
        everything = (high - low + 1 >= seq_len) | (counts > len(row))
        counts = torch.where(everything, len(row), counts)
        # Any start lists every block; a wrapped one could lie outside.
        start = torch.where(everything, 0, start)
    else:
        start = low.clamp(min=0) // block
        counts = high.clamp(max=seq_len - 1) // block - start + 1
    blocks = (start[:, None] + torch.arange(int(counts.max()))) % len(row)
    return BlockLists(counts.int(), blocks.int(), len(row))


def _rows(seq_len: int, block: int) -> tuple[Tensor, Tensor]:
    """Index of every block of queries, and the last query in it: int64 ``[rows]``."""
    row = torch.arange(-(-seq_len // block))
    return row, (row * block + block).clamp(max=seq_len) - 1


def listed(counts: Tensor, blocks: Tensor, columns: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """Lists in the form FlexAttention takes: ``[.., rows]`` and ``[.., rows, columns]``.

    It wants as many columns as the keys have blocks, n^2 / block^2 entries, though it reads only
    the counted ones. Lists ``[rows, width]`` that all heads share, or ``[heads, rows, width]``,
    therefore become an overlapping view of O(rows) memory, whose uncounted columns run on into the
    rows below. Lists ``[batch, heads, rows, width]`` are filled up. There are at least two rows and
    columns, since sizes of 1 are compiled in.

    Args:
        width: columns to make room for: on GPUs the full blocks are read by the strides of the
            others (torch 2.11), so both lists of a call must be equally wide.
    """
    pad = torch.nn.functional.pad
    rows, columns = max(2, blocks.shape[-2]), max(2, columns)
    short = rows - blocks.shape[-2]
    counts = pad(counts, (0, short))
    if blocks.ndim > 3:
        return counts, pad(blocks, (0, columns - blocks.shape[-1], 0, short)).contiguous()
    if blocks.ndim == 2:
        counts, blocks = counts[None], blocks[None]
    # A stride of 1, or one that happens to equal the number of columns, would be compiled in.
    stride = max(2, blocks.shape[-1], width)
    stride += stride == columns
    heads = len(blocks)
    room = blocks.new_zeros(heads * rows * stride + columns)
    of_heads = room[: heads * rows * stride].view(heads, rows, stride)
    of_heads[:, : blocks.shape[1], : blocks.shape[2]] = blocks
    strides = (len(room), rows * stride if heads > 1 else len(room), stride, 1)
    return counts[None], room.as_strided((1, heads, rows, columns), strides)
