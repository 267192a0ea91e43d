"""The best leaves of a tree of blocks for every query: a beam search over mean keys.

Level 0 are blocks of keys; a node of level l + 1 joins `branch` complete neighbours of level l.
Query i may choose among the first ``eligible[i]`` leaves. On a level it knows the nodes that are
made of eligible leaves alone; what is left over of the level below, fewer than `branch` nodes, has
no node yet and enters the search one level further down. The search starts where a query has at
most `beam` nodes, so that it does not depend on n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sa_patch.patterns.block_selection.block_means import block_means
from sa_patch.patterns.block_selection.pair_dots import pair_dots
from sa_patch.patterns.block_selection.top_candidates import best_places

PicksOf = Callable[[Any], Any]
"""From a number of eligible leaves, or a tensor of such, how many of them are chosen."""

# Scores that are held at once: on CPUs few enough to stay in the caches.
_HELD_CPU = 1 << 18
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
def best_blocks(
    q: Tensor,
    k: Tensor,
    eligible: Tensor,
    *,
    block_size: int,
    topk: int,
    branch: int,
    beam: int,
    most_of: Callable[[int], int] | None = None,
    picks_of: PicksOf | None = None,
) -> Tensor:
    """The chosen leaves of every query.

    Args:
        q: fp32 ``[kv_heads, group, nq, head_dim]``.
        k: ``[kv_heads, n, head_dim]``, the keys that the leaves are made of.
        eligible: int64 ``[nq]``.
        most_of: the eligible leaves of the first so many queries, at most, known without a look at
            the device; by default it is asked.
        picks_of: how many leaves a query chooses that may choose among so many, never fewer for
            more and at least `topk`; by default `topk`. Only without a tree.

    Returns:
        int64 ``[kv_heads, group, nq, m]``, in any order, -1 where fewer leaves are chosen; m is
        `topk`, or what a query chooses that may choose among most.
    """
    if most_of is None:

        def most_of(count: int) -> int:
            return int(eligible[:count].max())

    most = most_of(len(eligible)) if len(eligible) else 0
    width_of: PicksOf = picks_of or (lambda _: topk)
    shape = (*q.shape[:3], width_of(most))
    if not topk or not most:
        return torch.full(shape, -1, device=q.device)
    if most <= topk:
        return _all_of(eligible, shape[3]).expand(shape)
    means = level_means(k, block_size, branch, level_count(most, branch, beam))
    # Nodes of zeros stand for those that would follow, up to two families of them.
    means = [torch.nn.functional.pad(level, (0, 0, 0, 2 * branch)) for level in means]
    width = (beam + 1) * branch if branch else most
    held = _HELD_CPU if q.device.type == "cpu" else _HELD
    step = max(1, held // (q.shape[0] * q.shape[1] * width))
    chosen = []
    for low in range(0, q.shape[2], step):
        known = eligible[low : low + step]
        own_most = most_of(min(low + step, len(eligible)))
        limit = width_of(own_most)
        wanted = None if picks_of is None else picks_of(known)
        part = q[:, :, low : low + step]
        found = _search(part, means, known, own_most, limit, branch, beam, wanted)
        chosen.append(torch.nn.functional.pad(found, (0, shape[3] - limit), value=-1))
    return torch.cat(chosen, dim=2)


def _all_of(known: Tensor, width: int) -> Tensor:
    """The first nodes of a level: int64 ``[nq, width]``, -1 beyond `known`."""
    nodes = torch.arange(width, device=known.device)
    return nodes.where(nodes < known[:, None], -1)


def _search(
    q: Tensor,
    means: list[Tensor],
    eligible: Tensor,
    most: int,
    topk: int,
    branch: int,
    beam: int,
    wanted: Tensor | None,
) -> Tensor:
    """`best_blocks` for a few queries with at most `most` eligible leaves.

    Args:
        wanted: int64 ``[nq]``, the leaves of each query where not `topk`.
    """
    # Levels of which these queries know `beam` nodes at most leave nothing to choose.
    top = level_count(most, branch, beam) - 1
    kept = None
    for level in range(top, -1, -1):
        known = eligible // branch**level
        count = most // branch**level
        limit = beam if level else topk
        if count <= limit:
            kept = _all_of(known, limit).expand(*q.shape[:3], limit)
        elif kept is None:
            scores = _with_all(q, means[level][:, :count])
            absent = torch.arange(count, device=q.device) >= known[:, None]
            counts = known.clamp(max=limit) if wanted is None else known.minimum(wanted)
            kept = _best(scores, absent, counts, limit)
        else:
            kept = _best_children(q, means[level], count, kept, known, branch, limit)
    assert kept is not None
    return kept


def _best_children(
    q: Tensor, means: Tensor, count: int, kept: Tensor, known: Tensor, branch: int, limit: int
) -> Tensor:
    """The best nodes of a level among the children of nodes and those that have no parent yet.

    Args:
        means: fp32 ``[kv_heads, nodes, head_dim]`` of the level, zeros beyond those there are.
        count: nodes of the level that any of these queries knows.
        kept: int64 ``[kv_heads, group, nq, beam]``, nodes of the level above, -1 for none.
        known: int64 ``[nq]``, nodes of the level itself that each query knows.

    Returns:
        int64 ``[kv_heads, group, nq, limit]``, -1 for none.
    """
    # The nodes without a parent are what there is of the next one's children. Of equal scores the
    # earlier node is to win, so that all stand in order; what is absent comes last.
    above = (known // branch)[:, None]
    parents = torch.cat([kept.where(kept >= 0, above + 1), above.expand(*kept.shape[:3], 1)], -1)
    steps = torch.arange(branch, device=q.device)
    nodes = (parents.sort(dim=-1).values[..., None] * branch + steps).flatten(-2)
    gain = _PRODUCT_GAIN_CPU if q.device.type == "cpu" else _PRODUCT_GAIN
    if count <= nodes.shape[-1] * gain:
        scores = _with_all(q, means[:, : count + 2 * branch]).gather(-1, nodes)
    else:
        # One table of all heads' nodes.
        first = torch.arange(len(means), device=q.device)[:, None, None, None] * means.shape[1]
        flat = (nodes + first).flatten(0, 2)
        scores = pair_dots(q.flatten(0, 2), means.flatten(0, 1), flat).view(nodes.shape)
    found = (above.clamp(max=kept.shape[-1]) - above).squeeze(1) * branch + known
    best = _best(scores, nodes >= known[:, None], found.clamp(max=limit), limit)
    return nodes.gather(-1, best.clamp(min=0)).where(best >= 0, -1)


def _with_all(q: Tensor, nodes: Tensor) -> Tensor:
    """Dot products of all queries and nodes: ``[kv_heads, group, nq, nodes]``."""
    return (q.flatten(1, 2) @ nodes.transpose(1, 2)).unflatten(1, q.shape[1:3])


def _best(scores: Tensor, absent: Tensor, counts: Tensor, width: int) -> Tensor:
    """`best_places` of the nodes that are not absent."""
    lowest = torch.finfo(scores.dtype).min
    # A real score stays above what marks the absent, however low it is, NaN or not.
    scores.nan_to_num_(nan=lowest, neginf=lowest).masked_fill_(absent, -torch.inf)
    return best_places(scores, counts, width)


def scored_nodes(eligible: Tensor, *, topk: int, branch: int, beam: int) -> Tensor:
    """Dot products that each query spends on its search: int64, like `eligible`.

    Candidates of which all are kept need none.
    """
    levels = [each for _, each in _scored_levels(eligible, topk, branch, beam)]
    return torch.stack(levels).sum(0) if levels else torch.zeros_like(eligible)


def read_nodes(eligible: Tensor, *, topk: int, branch: int, beam: int) -> int:
    """Nodes whose means some queries read together for their searches, at most."""
    levels = _scored_levels(eligible, topk, branch, beam)
    return sum(min(nodes, int(each.sum())) for nodes, each in levels)


def _scored_levels(
    eligible: Tensor, topk: int, branch: int, beam: int
) -> Iterator[tuple[int, Tensor]]:
    """For each level how many nodes there are, and how many of them each query scores."""
    most = int(eligible.max()) if eligible.numel() else 0
    if not topk or not most:
        return
    if not branch:
        yield most, eligible.where(eligible > topk, 0)
        return
    for level in range(level_count(most, branch, beam)):
        above = eligible // branch ** (level + 1)
        candidates = above.clamp(max=beam) * branch + eligible // branch**level - above * branch
        scored = candidates.where(candidates > (beam if level else topk), 0)
        yield most // branch**level, scored
