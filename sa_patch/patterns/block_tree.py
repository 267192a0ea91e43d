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
from sa_patch.patterns.pair_dots import pair_dots

# Scores that are held at once: on CPUs few enough to stay in the caches.
_HELD_CPU = 1 << 17
_HELD = 1 << 22
# A product with all nodes of a level is this many times cheaper for each than with candidates only.
_PRODUCT_GAIN_CPU = 8
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


@torch.no_grad()
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
        int64 ``[kv_heads, group, nq, topk]``, in any order, -1 where fewer leaves are eligible.
    """
    shape = (*q.shape[:3], topk)
    most = int(eligible.max()) if eligible.numel() else 0
    if not topk or not most:
        return torch.full(shape, -1, device=q.device)
    if most <= topk:
        return _all_of(eligible, topk).expand(shape)
    means = level_means(k, block_size, branch, level_count(most, branch, beam))
    width = (beam + 1) * branch if branch else most
    held = _HELD_CPU if q.device.type == "cpu" else _HELD
    step = max(1, held // (q.shape[0] * q.shape[1] * width))
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
    # Levels of which these queries know `beam` nodes at most leave nothing to choose.
    most = int(eligible.max())
    top = level_count(most, branch, beam) - 1
    kept = None
    for level in range(top, -1, -1):
        known = eligible // branch**level
        nodes = means[level][:, : most // branch**level]
        limit = beam if level else topk
        if nodes.shape[1] <= limit:
            kept = _all_of(known, limit).expand(*q.shape[:3], limit)
        elif kept is None:
            kept = _best_of_all(q, nodes, known, limit)
        else:
            kept = _best_of(q, nodes, _children(kept, known, branch), limit)
    assert kept is not None
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


def _best_of_all(q: Tensor, nodes: Tensor, known: Tensor, limit: int) -> Tensor:
    """The `limit` best of the nodes ``[kv_heads, nodes, head_dim]`` that each query knows.

    Returns:
        int64 ``[kv_heads, group, nq, limit]``, -1 for none.
    """
    scores = _with_all(q, nodes)
    places = torch.arange(nodes.shape[1], device=q.device)
    best, found = _best(scores, places >= known[:, None], limit)
    return best.where(found, -1)


def _best_of(q: Tensor, nodes: Tensor, candidates: Tensor, limit: int) -> Tensor:
    """`_best_of_all` of candidates ``[kv_heads, group, nq, candidates]``, -1 for none."""
    short = limit - candidates.shape[-1]
    if short > 0:
        candidates = torch.nn.functional.pad(candidates, (0, short), value=-1)
    count, width = nodes.shape[1], candidates.shape[-1]
    places = candidates.clamp(min=0)
    gain = _PRODUCT_GAIN_CPU if q.device.type == "cpu" else _PRODUCT_GAIN
    if count <= width * gain:
        scores = _with_all(q, nodes).gather(-1, places)
    else:
        # One table of all heads' nodes.
        first = torch.arange(len(nodes), device=q.device)[:, None, None, None] * count
        flat = (places + first).flatten(0, 2)
        scores = pair_dots(q.flatten(0, 2), nodes.flatten(0, 1), flat).view(places.shape)
    best, found = _best(scores, candidates < 0, limit)
    return candidates.gather(-1, best).where(found, -1)


def _with_all(q: Tensor, nodes: Tensor) -> Tensor:
    """Dot products of all queries and nodes: ``[kv_heads, group, nq, nodes]``."""
    return (q.flatten(1, 2) @ nodes.transpose(1, 2)).unflatten(1, q.shape[1:3])


def _best(scores: Tensor, absent: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Places of the `limit` best scores, and whether there are so many; scores are overwritten."""
    lowest = torch.finfo(scores.dtype).min
    # A real score stays above what marks the absent, however low it is, NaN or not.
    scores = scores.nan_to_num_(nan=lowest, neginf=lowest).masked_fill_(absent, -torch.inf)
    found = (~absent).sum(-1, keepdim=True)
    best = first_best(scores, limit)
    return best, torch.arange(limit, device=scores.device) < found


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
