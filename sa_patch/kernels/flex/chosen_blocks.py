"""Blocks that queries choose by content, and the lists of key blocks that follow.

A block of queries needs every key block that one of them chose. With many small choices that is
nearly all of them: the lists keep the memory small then, and the masks the result exact, but not
the time below that of full attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.kernels.flex.blocks import BlockLists
from sa_patch.patterns import BlockTopK, MoBA
from sa_patch.patterns.moba import block_means

# Scores of MoBA's choice that are held at once: few enough for a core's cache, and on a GPU enough
# to be worth a launch.
_SCORE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


def first_near(pattern: MoBA | BlockTopK, positions: Tensor) -> Tensor:
    """Where the neighbourhood of each query begins, that it sees unchosen: int64, at least 0."""
    if isinstance(pattern, MoBA):
        return positions // pattern.block_size * pattern.block_size
    return pattern.sinks + pattern.eligible(positions) * pattern.block_size


def chosen_starts(pattern: MoBA | BlockTopK, q: Tensor, k: Tensor) -> Tensor:
    """Where the blocks that every query chose begin, ascending.

    A chosen block lies before the query's neighbourhood and is therefore whole and real, so that
    padding behind the last token changes no choice.

    Args:
        q: ``[batch, q_heads, n, head_dim]``.
        k: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        int32 ``[batch, q_heads, picks, n]``, n where there is none. The number of picks is a power
        of two, so that few families are compiled, or 0 for a pattern that chooses nothing.
    """
    batch, heads, seq_len = q.shape[:3]
    picks = (
        _moba_picks(pattern, q, k) if isinstance(pattern, MoBA) else _small_blocks(pattern, q, k)
    )
    first = pattern.sinks if isinstance(pattern, BlockTopK) else 0
    starts = (picks * pattern.block_size + first).masked_fill(picks < 0, seq_len)
    most = pattern.topk - 1 if isinstance(pattern, MoBA) else pattern.shared * pattern.topk
    room = 1 << (most - 1).bit_length() if most else 0
    ascending = starts.int().sort(dim=-1).values
    padded = torch.nn.functional.pad(ascending, (0, room - picks.shape[-1]), value=seq_len)
    return padded.transpose(1, 2).unflatten(0, (batch, heads))


def _moba_picks(pattern: MoBA, q: Tensor, k: Tensor) -> Tensor:
    """int64 ``[batch * q_heads, n, picks]``, -1 where there is none."""
    seq_len, folded = q.shape[2], q.flatten(0, 1)
    means = block_means(k.flatten(0, 1), pattern.block_size)
    step = max(1, _SCORE_ELEMENTS[q.device.type] // (len(folded) * max(1, means.shape[1])))
    chosen = []
    for low in range(0, seq_len, step):
        positions = torch.arange(low, min(low + step, seq_len), device=q.device)
        own = positions // pattern.block_size
        chosen.append(pattern.rank_blocks(folded[:, low : low + step], means, own))
    return torch.cat(chosen, dim=1)


def _small_blocks(pattern: BlockTopK, q: Tensor, k: Tensor) -> Tensor:
    """int64 ``[batch * q_heads, n, topk]``, -1 where there is none."""
    positions = torch.arange(q.shape[2], device=q.device)
    picks = pattern.picks(q.flatten(0, 1), k.flatten(0, 1), positions)
    return picks.repeat_interleave(q.shape[0] * q.shape[1] // len(picks), dim=0)


def content_blocks(
    near: Tensor, sinks: int, choices: list[tuple[Tensor, int]], block: int
) -> BlockLists:
    """Key blocks with a neighbourhood, a sink or a chosen key of some query.

    Args:
        near: int64 ``[n]``, the first key that each query sees up to itself; ascending.
        choices: starts int32 ``[batch, q_heads, picks, n]`` and the size of their blocks.

    Returns:
        lists ``[batch, q_heads, rows, rows]``, or ``[1, 1, rows, rows]`` where nothing is chosen.
    """
    rows = -(-len(near) // block)
    row = torch.arange(rows, device=near.device)
    fixed = (row >= near[::block, None] // block) | (row < -(-sinks // block))
    needed = (fixed & (row <= row[:, None]))[None, None]
    for starts, size in choices:
        needed = needed | _blocks_of(starts, size, rows, block)
    # A bool does not sort on every device, and only listed blocks may come first.
    order = needed.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return BlockLists(needed.sum(-1, dtype=torch.int32), order.int(), rows)


def _blocks_of(starts: Tensor, size: int, rows: int, block: int) -> Tensor:
    """Key blocks that hold a key of a chosen block: bool ``[batch, q_heads, rows, rows]``."""
    batch, heads, _, seq_len = starts.shape
    row = torch.arange(seq_len, device=starts.device) // block
    # One column too many takes the marks of absent blocks.
    marks = torch.zeros(batch, heads, rows * (rows + 1), dtype=torch.bool, device=starts.device)
    last = (starts + size - 1) // block
    # A block of `size` tokens reaches into so many key blocks after that of its first.
    for step in range((size + block - 2) // block + 1):
        column = torch.minimum(starts // block + step, last)
        column = torch.where(starts < seq_len, column, rows)
        marks.scatter_(-1, (row * (rows + 1) + column).flatten(2).long(), True)
    return marks.unflatten(-1, (rows, rows + 1))[..., :-1]
