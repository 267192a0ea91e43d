"""Fractional neural attention over the visible pairs of a pattern: O(n w) time and memory.

The pairs are one flat list, ordered by query, so that queries with many and with few keys need no
padding. Their vectors are gathered chunk by chunk, and gathered again in the backward pass instead
of being kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sa_patch.kernels.tiling import needs_gradients
from sa_patch.patterns import Pattern
from sa_patch.patterns.visible_pairs import visible_pairs
from sa_patch.training.fractional.distance_kernel import DistanceKernel

# Pairs whose vectors are gathered at once, or n if that is more: the gradient of a chunk is as
# large as q or k, so smaller chunks would save no memory.
_CHUNK = 1 << 15


def attend_pairs(
    kernel: DistanceKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    start: int = 0,
    layer: int = 0,
    head: int = 0,
    causal: bool = True,
    exclude_self: bool = False,
) -> Tensor:
    """Attention of sequences of one length without padding, whose heads all see the same keys.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``, at positions ``start .. start + nq - 1``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        head: index of the query head, for patterns that are drawn for each head.

    Returns:
        ``[batch, q_heads, nq, v's head_dim]``; zero for a query that sees nothing.
    """
    queries, keys = _pairs(pattern, k.shape[2], layer, head, causal, exclude_self)
    if start or q.shape[2] < k.shape[2]:
        low, high = torch.searchsorted(queries, torch.tensor([start, start + q.shape[2]])).tolist()
        queries, keys = queries[low:high] - start, keys[low:high]
    queries, keys = queries.to(q.device), keys.to(q.device)
    grouped = q.unflatten(1, (k.shape[1], -1))
    k, v = k[:, :, None], v[:, :, None]
    if not len(queries):
        return (q.sum() * 0).expand(*q.shape[:3], v.shape[-1])
    chunk = max(_CHUNK, k.shape[-2])
    parts = list(zip(queries.split(chunk), keys.split(chunk), strict=True))
    recompute = needs_gradients(q, k, v) and len(parts) > 1

    def run(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not recompute:
            return function(*inputs)
        out: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return out

    def distances(q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return kernel.paired_distances(q.index_select(-2, i), k.index_select(-2, j))

    g = torch.cat([run(distances, grouped, k, i, j) for i, j in parts], dim=-1)
    kappa: Tensor | float
    if kernel.bandwidth == "median":
        median = g.detach().median(-1, keepdim=True).values
        kappa = median.where(median > 0, 1)
    else:
        kappa = float(kernel.bandwidth)
    logs = kernel.log_weights(g, q.shape[-1], kappa)
    if kernel.density:
        # By the columns' sums alone: a row's own sum cancels when the row is normalized.
        logs = logs - kernel.density * _normalized(logs, keys, k.shape[-2])[1]
    weights = _normalized(logs, queries, q.shape[2])[0]

    def gathered(weights: Tensor, v: Tensor, i: Tensor, j: Tensor) -> Tensor:
        low = int(i[0])
        # Pairs are ordered by query, so that a chunk writes to few rows.
        out = v.new_zeros(*weights.shape[:-1], int(i[-1]) - low + 1, v.shape[-1])
        return out.index_add(-2, i - low, weights[..., None] * v.index_select(-2, j))

    out = v.new_zeros(*grouped.shape[:-1], v.shape[-1])
    for (i, j), some in zip(parts, weights.split(chunk, dim=-1), strict=True):
        rows = run(gathered, some, v, i, j)
        low = int(i[0])
        places = torch.arange(low, low + rows.shape[-2], device=q.device)
        out = out.index_add(-2, places, rows)
    return out.flatten(1, 2)


def _normalized(logs: Tensor, owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """Weights that sum to one over the pairs of an owner, and each pair's log of its owner's sum.

    Args:
        logs: ``[..., pairs]``.
        owner: int64 ``[pairs]``, the query or the key of each pair, below `owners`.
    """
    index = owner.expand(logs.shape)
    peak = logs.new_full((*logs.shape[:-1], owners), -torch.inf)
    peak = peak.scatter_reduce(-1, index, logs.detach(), "amax").index_select(-1, owner)
    weights = (logs - peak).exp()
    # At least one, the largest of the owner's weights.
    total = weights.new_zeros(*logs.shape[:-1], owners).index_add(-1, owner, weights)
    total = total.index_select(-1, owner)
    return weights / total, total.log() + peak


@lru_cache(maxsize=8)
def _pairs(
    pattern: Pattern, seq_len: int, layer: int, head: int, causal: bool, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    queries, keys = visible_pairs(pattern, seq_len, layer=layer, head=head, causal=causal)
    if exclude_self:
        other = queries != keys
        queries, keys = queries[other], keys[other]
    return queries, keys
