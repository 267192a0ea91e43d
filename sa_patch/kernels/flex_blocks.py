"""Which blocks of keys each block of queries needs: the lists that FlexAttention walks.

Everything here is plain torch over block indices. For a window or a ring the lists follow from
the band alone, O(n w / block^2) entries; for MoBA from the choice of every query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa_patch.patterns.moba import MoBA, block_means

# Scores of MoBA's choice that are held at once: few enough for a core's cache, and on a GPU enough
# to be worth a launch.
_SCORE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass(frozen=True)
class BlockLists:
    """Blocks of keys by row, a row being one block of queries.

    Args:
        counts: int32 ``[..., rows]``, how many entries of `blocks` are meant.
        blocks: int32 ``[..., rows, width]``, key blocks of which some pairs are visible; the mask
            is tested in them.
        full_counts, full_blocks: the same for key blocks of which all pairs are visible; None
            where there are none to tell apart.
    """

    counts: Tensor
    blocks: Tensor
    full_counts: Tensor | None = None
    full_blocks: Tensor | None = None


def window_blocks(seq_len: int, window: int, block: int) -> BlockLists:
    """The causal band ``0 <= i - j < window``, on the CPU."""
    row, last_query = _rows(seq_len, block)
    first = ((row * block - window + 1) // block).clamp(min=0)
    # The first key of a whole block must be in reach of the row's last query.
    first_full = torch.maximum(first, -((window - 1 - last_query) // block)).clamp(max=len(row))
    left = torch.minimum(first_full, row) - first
    counts = left + 1
    entry = torch.arange(int(counts.max()))
    partial = torch.where(entry < left[:, None], first[:, None] + entry, row[:, None])
    full_counts = (row - first_full).clamp(min=0)
    full = first_full[:, None] + torch.arange(max(1, int(full_counts.max())))
    return BlockLists(
        counts.int(), partial.int(), full_counts.int(), full.clamp(max=len(row) - 1).int()
    )


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
    return BlockLists(counts.int(), blocks.int())


def _rows(seq_len: int, block: int) -> tuple[Tensor, Tensor]:
    """Index of every block of queries, and the last query in it: int64 ``[rows]``."""
    row = torch.arange(-(-seq_len // block))
    return row, (row * block + block).clamp(max=seq_len) - 1


def chosen_blocks(pattern: MoBA, q: Tensor, k: Tensor, block: int) -> tuple[BlockLists, Tensor]:
    """The blocks that any query of a row has in view.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        lists of ``[batch, q_heads, rows, ...]``, and the positions at which the blocks in each
        query's view start: int32 ``[n, batch, q_heads, blocks in view]``, the query's own first,
        n where there is none.
    """
    batch, heads, seq_len = q.shape[:3]
    size, device = pattern.block_size, q.device
    means = block_means(k.flatten(0, 1), size)
    folded, complete = q.flatten(0, 1), means.shape[1]
    picks = min(pattern.topk - 1, complete)
    step = max(1, _SCORE_ELEMENTS[device.type] // (len(folded) * max(1, complete) * block)) * block
    starts, marked = [], []
    for first in range(0, seq_len, step):
        part = folded[:, first : first + step]
        own = torch.arange(first, first + part.shape[1], device=device) // size
        chosen = pattern.choose_blocks(part, means, own)
        block_start = torch.arange(complete, device=device, dtype=torch.int32) * size
        best = torch.where(chosen, block_start, -1).topk(picks, dim=-1).values
        own_start = (own * size).int()[None, :, None].expand(len(folded), -1, 1)
        starts.append(torch.cat([own_start, best.masked_fill(best < 0, seq_len)], dim=-1))
        padded = torch.nn.functional.pad(chosen, (0, 0, 0, -part.shape[1] % block))
        marked.append(padded.unflatten(1, (-1, block)).any(2))
    needed = _key_blocks(torch.cat(marked, dim=1), size, seq_len, block)
    # A bool does not sort on every device, and only listed blocks may come first.
    order = needed.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    lists = BlockLists(
        needed.sum(-1, dtype=torch.int32).unflatten(0, (batch, heads)),
        order.int().unflatten(0, (batch, heads)),
    )
    return lists, torch.cat(starts, dim=1).transpose(0, 1).unflatten(1, (batch, heads)).contiguous()


def _key_blocks(marked: Tensor, size: int, seq_len: int, block: int) -> Tensor:
    """Key blocks that overlap a row's chosen or own blocks.

    Args:
        marked: bool ``[heads, rows, complete]``, pattern blocks of `size` tokens that some query
            of the row chose.

    Returns:
        bool ``[heads, rows, rows]`` over kernel blocks of `block` tokens.
    """
    rows, complete = marked.shape[1:]
    row = torch.arange(rows, device=marked.device)
    low = (row * block // size).clamp(max=complete)
    high = ((row * block + block - 1) // size + 1).clamp(max=complete)
    before = torch.nn.functional.pad(marked.int().cumsum(-1), (1, 0))
    chosen = before[..., high] > before[..., low]
    own_low = row * block // size * size // block
    own = (row >= own_low[:, None]) & (row <= row[:, None])
    return chosen | own
