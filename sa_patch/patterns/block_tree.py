"""The best leaves of a tree of blocks for every query: a beam search over mean keys.

Level 0 are blocks of keys; a node of level l + 1 joins `branch` complete neighbours of level l.
Query i may choose among the first ``eligible[i]`` leaves. On a level it knows the nodes that are
made of eligible leaves alone; what is left over of the level below, fewer than `branch` nodes, has
no node yet and enters the search one level further down. The search starts where a query has at
most `beam` nodes, so that it does not depend on n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.patterns.choice import first_best
from sa_patch.patterns.moba import block_means

# Scores, or elements of gathered means, that are held at once.
_HELD = 1 << 22
# A product with all nodes of a level is this many times cheaper for each than gathering candidates.
_PRODUCT_GAIN = 16


def level_means(k: Tensor, block_size: int, branch: int, levels: int) -> list[Tensor]:
    """Mean keys of the complete nodes of every level, leaves first.

    Args:
        k: ``[kv_heads, n, head_dim]``.

    Returns:
        `levels` tensors, fp32 ``[kv_heads, nodes, head_dim]``.
    """
    means = [block_means(k, block_size)]
    while len(means) < levels:
        means.append(block_means(means[-1], branch))
    return means


def level_count(most: int, branch: int, beam: int) -> int:
    """Levels with more than `beam` nodes for a query with `most` eligible leaves; at least 1."""
    levels = 1
    while branch and most // branch**levels > beam:
        levels += 1
    return levels


def best_leaves(
    q: Tensor,
    k: Tensor,
    eligible: Tensor,
    *,
    block_size: int,
    topk: int,
    branch: int,
    beam: int,
) -> Tensor:
    """The chosen leaves of every query.

    Args:
        q: fp32 ``[kv_heads, group, nq, head_dim]``.
        k: ``[kv_heads, n, head_dim]``, the keys that the leaves are made of.
        eligible: int64 ``[nq]``.

    Returns:
        int64 ``[kv_heads, group, nq, topk]``, -1 where fewer leaves are eligible.
    """
    shape = (*q.shape[:3], topk)
    most = int(eligible.max()) if eligible.numel() else 0
    if not topk or not most:
        return torch.full(shape, -1, device=q.device)
    if most <= topk:
        return _all_of(eligible, topk).expand(shape)
    means = level_means(k, block_size, branch, level_count(most, branch, beam))
    leaves = means[0].shape[1]
    width = (beam + 1) * branch if branch else leaves
    gathered = width if leaves <= width * _PRODUCT_GAIN else width * q.shape[3]
    held = max(gathered, min(leaves, width * _PRODUCT_GAIN))
    step = max(1, _HELD // (q.shape[0] * q.shape[1] * held))
    chosen = [
        _search(q[:, :, low : low + step], means, eligible[low : low + step], topk, branch, beam)
        for low in range(0, q.shape[2], step)
    ]
    return torch.cat(chosen, dim=2)


def _all_of(eligible: Tensor, width: int) -> Tensor:
    """The first nodes of a level: int64 ``[nq, width]``, -1 beyond `eligible`."""
    nodes = torch.arange(width, device=eligible.device)
    return nodes.where(nodes < eligible[:, None], -1)


def _search(
    q: Tensor, means: list[Tensor], eligible: Tensor, topk: int, branch: int, beam: int
) -> Tensor:
    """`best_leaves` for a few queries."""
    top = len(means) - 1
    if not branch:
        candidates = _all_of(eligible, means[0].shape[1]).expand(*q.shape[:3], -1)
        return _best(q, means[0], candidates, topk)
    # All nodes above the highest level that is scored: at most `beam` for every query.
    kept = _all_of(eligible // branch ** (top + 1), beam).expand(*q.shape[:3], -1)
    for level in range(top, -1, -1):
        known = eligible // branch**level
        candidates = _children(kept, known, branch)
        kept = _best(q, means[level], candidates, beam if level else topk)
    return kept


def _children(kept: Tensor, known: Tensor, branch: int) -> Tensor:
    """Candidates of the next level, ascending, absent ones (-1) anywhere.

    Args:
        kept: int64 ``[kv_heads, group, nq, beam]``, nodes of the level above, -1 for none.
        known: int64 ``[nq]``, nodes of the level itself that a query knows.
    """
    steps = torch.arange(branch, device=kept.device)
    ordered = kept.sort(dim=-1).values[..., None]
    children = (ordered * branch + steps).where(ordered >= 0, -1).flatten(-2)
    left_over = known[:, None] // branch * branch + steps[:-1]
    left_over = left_over.where(left_over < known[:, None], -1)
    return torch.cat([children, left_over.expand(*kept.shape[:3], -1)], dim=-1)


def _best(q: Tensor, means: Tensor, candidates: Tensor, limit: int) -> Tensor:
    """The `limit` best of the candidates: int64 ``[kv_heads, group, nq, limit]``, -1 for none."""
    short = limit - candidates.shape[-1]
    if short > 0:
        candidates = torch.nn.functional.pad(candidates, (0, short), value=-1)
    nodes, width = means.shape[1], candidates.shape[-1]
    absent = candidates < 0
    places = candidates.clamp(min=0)
    if nodes <= width * _PRODUCT_GAIN:
        every = q.flatten(1, 2) @ means.transpose(1, 2)
        scores = every.unflatten(1, q.shape[1:3]).gather(-1, places)
    else:
        heads = torch.arange(len(means), device=q.device)[:, None]
        near = means[heads, places.flatten(1)].view(*places.shape, -1)
        scores = (near @ q[..., None]).squeeze(-1)
    # A real score stays above what marks the absent, however low it is, NaN or not.
    scores = scores.nan_to_num(torch.finfo(scores.dtype).min).clamp_(
        min=torch.finfo(scores.dtype).min
    )
    best = first_best(scores.masked_fill_(absent, -torch.inf), limit)
    chosen = candidates.gather(-1, best)
    # Rounds of argmax name the first candidate again once all are taken.
    found = (~absent).sum(-1, keepdim=True)
    return chosen.where(torch.arange(limit, device=q.device) < found, -1)


def scored_nodes(eligible: Tensor, *, topk: int, branch: int, beam: int) -> Tensor:
    """Dot products that each query spends on its search: int64, like `eligible`.

    Candidates of which all are kept need none.
    """
    if not topk:
        return torch.zeros_like(eligible)
    if not branch:
        return eligible.where(eligible > topk, 0)
    most = int(eligible.max()) if eligible.numel() else 0
    total = torch.zeros_like(eligible)
    for level in range(level_count(most, branch, beam)):
        above = eligible // branch ** (level + 1)
        candidates = above.clamp(max=beam) * branch + eligible // branch**level - above * branch
        total += candidates.where(candidates > (beam if level else topk), 0)
    return total
