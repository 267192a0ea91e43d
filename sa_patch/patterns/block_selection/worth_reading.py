"""Blocks that are worth reading: those whose attention is a share of what a query sees anyway.

The attention that a query pays to a block is the sum of the exponentials of its scores. A mean key
alone tells too little of it, since the largest scores count most: of scores spread like a normal
distribution the logarithm of their mean exponential is half their variance above their mean. The
variance of a block's keys, a mean over dimensions, stands for that: one number to a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sa_patch.patterns.block_selection.block_means import block_means
from sa_patch.patterns.block_selection.top_candidates import best_places

# Queries that are taken at once: the scores of their neighbourhoods lie in a band.
_QUERIES_CPU = 64
_QUERIES = 1024


class BlockStatistics(NamedTuple):
    """Of complete blocks: fp32 ``[kv_heads, blocks, head_dim]`` and ``[kv_heads, blocks]``."""

    means: Tensor
    variances: Tensor

    @classmethod
    def of(cls, k: Tensor, block_size: int) -> BlockStatistics:
        """Of keys ``[kv_heads, n, head_dim]``; variances are means over dimensions."""
        means = block_means(k, block_size)
        complete = means.shape[1] * block_size
        apart = k[:, :complete].float().unflatten(1, (-1, block_size)) - means[:, :, None]
        return cls(means, apart.square().mean((2, 3)))


@torch.no_grad()
def blocks_worth_reading(
    q: Tensor,
    k: Tensor,
    positions: Tensor | range,
    eligible: Callable[[Tensor], Tensor],
    eligible_at: Callable[[int], int],
    *,
    sinks: int,
    block_size: int,
    topk: int,
    threshold: float,
    grouped: bool,
) -> Tensor:
    """The blocks of each query whose attention is thought to be `threshold` of the unchosen keys'.

    Args:
        q: ``[kv_heads, group, nq, head_dim]``; scores are scaled by ``head_dim ** -0.5``.
        k: ``[kv_heads, n, head_dim]``; block 0 begins with key `sinks`.
        positions: int64 ``[nq]``, of the queries; a range where they follow each other, so that
            nothing is asked of the device.
        eligible, eligible_at: of how many first blocks the query at a position may choose, never
            fewer at a later one; what follows these, up to its own key, it sees unchosen.
        topk: chosen blocks, at most: those with the largest share.
        grouped: the heads of a group choose together, by the largest share of any of them.

    Returns:
        int64 ``[kv_heads, group, nq, topk]``, group 1 with `grouped`; -1 where there are fewer.
    """
    q = q.float() * q.shape[-1] ** -0.5
    blocks = BlockStatistics.of(k[:, sinks:], block_size)
    step = _QUERIES_CPU if q.device.type == "cpu" else _QUERIES
    choosers = len(q), 1 if grouped else q.shape[1]
    found = [torch.empty(*choosers, 0, topk, dtype=torch.int64, device=q.device)]
    for low in range(0, q.shape[2], step):
        part = slice(low, min(low + step, q.shape[2]))
        queries, own = q[:, :, part], positions[part]
        if isinstance(own, range):
            first, last = own[0], own[-1]
            own = torch.arange(first, last + 1, device=q.device)
        else:
            first, last = int(own.min()), int(own.max())
        most = eligible_at(last)
        width = min(topk, most)
        if not width:
            nothing = torch.full((*choosers, queries.shape[2], topk), -1, device=q.device)
            found.append(nothing)
            continue
        of_each = eligible(own)
        near = sinks + of_each * block_size
        nearest = sinks + eligible_at(first) * block_size
        keys = torch.arange(nearest - sinks, last + 1, device=q.device)
        keys = keys.where(keys >= nearest, keys - (nearest - sinks))
        seen = ((keys < sinks) | (keys >= near[:, None])) & (keys <= own[:, None])
        scores = (queries @ k[:, None, keys].float().mT).masked_fill_(~seen, -torch.inf)
        shares = log_masses(queries, blocks, most, block_size) - scores.logsumexp(-1, keepdim=True)
        if grouped:
            shares = shares.amax(1, keepdim=True)
        lowest = torch.finfo(shares.dtype).min
        absent = torch.arange(most, device=q.device) >= of_each[:, None]
        # A real share stays above what marks the absent, however small it is, NaN or not.
        shares.nan_to_num_(nan=lowest, neginf=lowest).masked_fill_(absent, -torch.inf)
        best = best_places(shares.clone(), of_each.clamp(max=width), width)
        worth = shares.gather(-1, best.clamp(min=0)) >= math.log(threshold)
        best = best.where(worth & (best >= 0), -1)
        found.append(torch.nn.functional.pad(best, (0, topk - width), value=-1))
    return torch.cat(found, dim=2)


def log_masses(q: Tensor, blocks: BlockStatistics, count: int, block_size: int) -> Tensor:
    """Estimated logarithm of the sum of exponentials of queries' scores in the first blocks.

    Args:
        q: scaled, fp32 ``[kv_heads, group, nq, head_dim]``.

    Returns:
        ``[kv_heads, group, nq, count]``.
    """
    means, variances = blocks.means[:, None, :count], blocks.variances[:, None, None, :count]
    squares = q.square().sum(-1, keepdim=True)
    return q @ means.mT + squares * variances / 2 + math.log(block_size)
