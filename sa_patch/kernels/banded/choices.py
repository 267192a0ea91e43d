"""What queries choose by content, for as many of them as may be held at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sa_patch.kernels.tiling import queries_at_once
from sa_patch.patterns.base import Rule
from sa_patch.patterns.block_selection.block_means import block_means
from sa_patch.patterns.block_topk import BlockTopK
from sa_patch.patterns.moba import MoBA

# Scores of the choice that are held at once: on CPUs few enough to stay in the caches.
_RANKED_CPU = 1 << 18
_RANKED = 1 << 22
# Choices of queries that are held at once where they grow with the position.
CHOSEN = 1 << 21
# Of so many queries at least: each part reads all keys before it once more.
_LEAST_QUERIES = 512


def parts_of_queries(
    patterns: Sequence[MoBA | BlockTopK], q: Tensor, start: int
) -> Iterator[tuple[slice, int, int]]:
    """Queries whose choices are held at once, in whole tiles of all patterns.

    All of them, unless what a query sees by choice grows with its tile or with its position.

    Args:
        q: ``[q_heads, nq, head_dim]``, at positions ``start ..``.

    Yields:
        The queries, the position of the first, and the number of keys up to the last.
    """
    heads, queries = q.shape[:2]
    of_a_query = heads * sum(
        part.shared * part.most_picks(start + queries)
        for part in patterns
        if isinstance(part, BlockTopK) and (part.shared > 1 or part.percent)
    )
    tile = math.lcm(*(part.shared_queries for part in patterns))
    step = max(1, queries)
    if of_a_query:
        step = max(queries_at_once(of_a_query, CHOSEN, tile), -(-_LEAST_QUERIES // tile) * tile)
    for low in range(0, max(1, queries), step):
        high = min(low + step, queries)
        yield slice(low, high), start + low, start + high


def choose(pattern: MoBA | BlockTopK, q: Tensor, k: Tensor, start: int) -> Tensor:
    """The blocks that the queries of one sequence choose, own blocks not among them.

    Args:
        q: ``[q_heads, nq, head_dim]``, at positions ``start ..``.
        k: ``[kv_heads, n, head_dim]``.

    Returns:
        int64 ``[q_heads, nq, m]``, -1 for none; a block stands at most once in a row.
    """
    positions = torch.arange(start, start + q.shape[1], device=q.device)
    q, k = q.detach(), k.detach()
    if isinstance(pattern, BlockTopK):
        picks = pattern.picks(q, k, range(start, start + q.shape[1]))
        return picks.repeat_interleave(len(q) // len(picks), dim=0)
    means = block_means(k, pattern.block_size)
    width = min(pattern.topk - 1, means.shape[1])
    held = _RANKED_CPU if q.device.type == "cpu" else _RANKED
    step = max(1, held // max(1, len(q) * means.shape[1]))
    parts = []
    for low in range(0, q.shape[1], step):
        last = min(start + low + step, start + q.shape[1]) - 1
        # No query of this part may choose a later block; the first ones, `width`, are always there.
        known = means[:, : max(width, last // pattern.block_size)]
        own = positions[low : low + step] // pattern.block_size
        parts.append(pattern.rank_blocks(q[:, low : low + step], known, own))
    return torch.cat(parts, dim=1)


def chosen_rule(pattern: MoBA | BlockTopK, picks: Tensor, start: int) -> Rule:
    """Whether key j lies in a block that query i chose, given ``picks [q_heads, nq, m]``."""
    size, first = pattern.block_size, first_token(pattern)

    def rule(i: Tensor, j: Tensor) -> Tensor:
        i, j = torch.broadcast_tensors(i, j)
        block = torch.div(j - first, size, rounding_mode="floor")
        heads = torch.arange(len(picks), device=picks.device).view(-1, *[1] * (i.dim() - 1))
        found = torch.zeros(1, dtype=torch.bool, device=picks.device)
        # One by one: all at once would hold m copies of what is asked.
        for pick in picks.unbind(-1):
            found = found | (pick[heads, i - start] == block)
        return found & (block >= 0)

    return rule


def first_token(pattern: MoBA | BlockTopK) -> int:
    return pattern.sinks if isinstance(pattern, BlockTopK) else 0
