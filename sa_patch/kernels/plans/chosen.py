"""The blocks that every query chose, as tables that a mask can search."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.patterns import BlockTopK, MoBA
from sa_patch.patterns.block_selection.block_means import block_means

# Scores of MoBA's choice that are held at once: few enough for a core's cache, and on a GPU enough
# to be worth a launch.
_SCORES_CPU, _SCORES = 1 << 20, 1 << 24
# What the lists of one call may take: where tiles share choices, each query lists its tile's.
MOST_BYTES = 4 << 30


def too_long(pattern: MoBA | BlockTopK, q: Tensor, k: Tensor) -> str:
    """Why `chosen_starts` cannot list the choices of a call; empty where it can.

    Asked where lists grow with n: each query lists its tile's choices, or a share of all blocks.
    """
    if not isinstance(pattern, BlockTopK) or (pattern.shared == 1 and not pattern.percent):
        return ""
    choosers = k.shape[1] if pattern.grouped else q.shape[1]
    # int64 while they are chosen.
    size = 8 * q.shape[0] * choosers * q.shape[2] * _width(pattern, k.shape[2])
    if size <= MOST_BYTES:
        return ""
    return (
        f"lists of what each query sees of {pattern.name} would take {size / 2**30:,.0f} GiB, more "
        f"than {MOST_BYTES >> 30}"
    )


@torch.no_grad()
def chosen_starts(pattern: MoBA | BlockTopK, q: Tensor, k: Tensor) -> Tensor:
    """Where the blocks that every query chose begin, ascending.

    A chosen block lies before the query's neighbourhood and is therefore whole and real, so that
    padding behind the last token changes no choice.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``, the last queries where they are fewer than the keys.
        k: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        int32 ``[batch, choosers, picks, nq]``, n where there is none; a chooser is a query head, or
        a KV head where its query heads choose together. The number of picks is a power of four, so
        that few masks are compiled, or 0 for a pattern that chooses nothing.
    """
    batch, seq_len = k.shape[0], k.shape[2]
    queries, keys = q.flatten(0, 1), k.flatten(0, 1)
    positions = range(seq_len - q.shape[2], seq_len)
    if isinstance(pattern, MoBA):
        first = 0
        picks = _moba_picks(pattern, queries, keys, positions)
    else:
        first = pattern.sinks
        picks = pattern.picks(queries, keys, positions)
    starts = (picks * pattern.block_size + first).masked_fill(picks < 0, seq_len)
    room = (0, _width(pattern, seq_len) - picks.shape[-1])
    ascending = pad(starts.int().sort(dim=-1).values, room, value=seq_len)
    return ascending.transpose(1, 2).unflatten(0, (batch, -1))


def _width(pattern: MoBA | BlockTopK, seq_len: int) -> int:
    """The number of picks of a query, rounded up to a power of four; 0 where nothing is chosen."""
    if isinstance(pattern, MoBA):
        most = pattern.topk - 1
    else:
        most = pattern.shared * pattern.most_picks(seq_len)
    return 4 ** -((most - 1).bit_length() // -2) if most else 0


def _moba_picks(pattern: MoBA, q: Tensor, k: Tensor, positions: range) -> Tensor:
    """int64 ``[batch * q_heads, nq, picks]``, -1 where there is none."""
    means = block_means(k, pattern.block_size)
    held = _SCORES_CPU if q.device.type == "cpu" else _SCORES
    step = max(1, held // (len(q) * max(1, means.shape[1])))
    own = torch.arange(positions.start, positions.stop, device=q.device) // pattern.block_size
    chosen = [
        pattern.rank_blocks(queries, means, blocks)
        for queries, blocks in zip(q.split(step, dim=1), own.split(step), strict=True)
    ]
    return torch.cat(chosen, dim=1)
