"""Attention over small chosen blocks on a CPU: every query meets its own keys, none is copied.

The scores are chosen entries of one product of matrices, and the output is a weighted sum of chosen
rows: torch has an operator for each, which reads the rows where they lie. A query's sums do not
depend on what others chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.patterns.base import Rule
from sa_patch.patterns.block_selection.pair_dots import pair_dots

# Scores that are held at once: few enough to stay in the caches.
_SCORES = 1 << 18


def attend_small_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    picks: Tensor,
    *,
    first: int,
    size: int,
    start: int,
    unless: Rule | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of one sequence over the blocks they chose. Not differentiable.

    Args:
        q: ``[q_heads, nq, head_dim]``, scaled, fp32 or fp64; at positions ``start ..``.
        k, v: ``[kv_heads, n, head_dim]``, like q.
        picks: int64 ``[q_heads, nq, m]``, chosen blocks, each once; -1 for none.
        first: the token that block 0 begins with.
        size: tokens of a block.
        unless: names keys of chosen blocks that are hidden all the same.

    Returns:
        Output ``[q_heads, nq, head_dim]``, zero where nothing is seen, and the log-sum-exp of the
        scores ``[q_heads, nq]``, -inf there.
    """
    heads, queries, head_dim = q.shape
    if not picks.shape[2] or k.shape[1] < first + size:
        return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    keys, values = _table(k, first), _table(v, first)
    nowhere = len(keys) - 1
    first_row = torch.arange(heads) // (heads // len(k)) * (k.shape[1] - first)
    offsets = torch.arange(size)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2])
    step = max(1, _SCORES // (heads * picks.shape[2] * size))
    for low in range(0, queries, step):
        part = slice(low, low + step)
        chosen = picks[:, part, :, None]
        tokens = (chosen * size + offsets).flatten(2)
        seen = (chosen >= 0).expand(-1, -1, -1, size).flatten(2)
        if unless is not None:
            positions = torch.arange(start + low, start + low + seen.shape[1])[None, :, None]
            seen = seen & ~unless(positions, tokens.clamp(min=0) + first)
        places = (tokens + first_row[:, None, None]).where(seen, nowhere).flatten(0, 1)
        scores = pair_dots(q[:, part].reshape(-1, head_dim), keys, places)
        weights, sums = _softmax(scores, seen.flatten(0, 1))
        mixed = torch.nn.functional.embedding_bag(
            places, values, mode="sum", per_sample_weights=weights
        )
        out[:, part] = mixed.unflatten(0, (heads, -1))
        lse[:, part] = sums.unflatten(0, (heads, -1))
    return out, lse


def _table(x: Tensor, first: int) -> Tensor:
    """The tokens from `first` on of all heads, one after the other, and a row of zeros."""
    return torch.nn.functional.pad(x[:, first:].flatten(0, 1), (0, 0, 0, 1))


def _softmax(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of ``scores [rows, keys]``, overwritten, and log-sum-exp; rows may be empty."""
    scores.masked_fill_(~seen, -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    # Of a row that sees something the largest weight is 1.
    weights /= total.clamp(min=1)
    return weights, (total.log() + peak).squeeze(-1)
