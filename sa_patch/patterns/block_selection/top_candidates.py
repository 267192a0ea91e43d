"""Picking the best of scored candidates, the same on every device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Up to this many picks, one argmax for each is faster than what else settles ties: on CPUs torch's
# topk, on other devices, where looking for ties would mean waiting for them, a sort.
_ARGMAX_PICKS_CPU = 2
_ARGMAX_PICKS = 8


def best_places(scores: Tensor, counts: Tensor, width: int) -> Tensor:
    """The largest scores of every row, as many as are wanted of it; of equal ones the first.

    Args:
        scores: ``[..., rows, candidates]``, at least `width` of them, without NaN; -inf marks what
            is no candidate. May be overwritten.
        counts: int64 ``[rows]``, at most `width` and the candidates of a row.

    Returns:
        int64 ``[..., rows, width]``, in any order, -1 beyond what is wanted.
    """
    wanted = torch.arange(width, device=scores.device) < counts[:, None]
    if scores.device.type != "cpu":
        return first_best(scores, width).where(wanted, -1)
    # Numpy sorts numbers alone by vector instructions, several times as fast as torch finds the
    # best with their places. From the least that is wanted these are told at once.
    ordered = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    last = (scores.shape[-1] - counts).clamp(max=scores.shape[-1] - 1)
    least = ordered.gather(-1, last.expand(scores.shape[:-1])[..., None])
    chosen = scores >= least.masked_fill_(counts[:, None] == 0, torch.inf)
    surplus = chosen.sum(-1) - counts
    if surplus.any():
        tied = surplus > 0
        equal = scores[tied] == least[tied]
        # Of the equal ones as many as there are too many, the last ones, give way.
        kept = equal.sum(-1) - surplus[tied]
        chosen[tied] &= ~equal | (equal.cumsum(-1) <= kept[:, None])
    places = torch.from_numpy(np.flatnonzero(chosen.numpy()) % scores.shape[-1])
    table = places.new_full((*scores.shape[:-1], width), -1)
    return table.masked_scatter_(wanted.expand_as(table), places)


def first_best(scores: Tensor, picks: int) -> Tensor:
    """The `picks` largest scores of every row, largest first; of equal ones the first.

    Args:
        scores: ``[..., candidates]``, at least `picks` of them, without NaN; -inf marks what is no
            candidate. May be overwritten.

    Returns:
        int64 ``[..., picks]``. Where a row has fewer candidates, any places fill it up.
    """
    on_cpu = scores.device.type == "cpu"
    if picks <= (_ARGMAX_PICKS_CPU if on_cpu else _ARGMAX_PICKS):
        return _by_argmax(scores, picks)
    if on_cpu:
        return _by_topk(scores, picks)
    # A stable sort, unlike topk, settles equal scores by position.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :picks]


def _by_argmax(scores: Tensor, picks: int) -> Tensor:
    """`first_best`, one by one: argmax finds the first of several."""
    rounds = []
    for _ in range(picks):
        rounds.append(scores.argmax(-1, keepdim=True))
        scores.scatter_(-1, rounds[-1], -torch.inf)
    if not rounds:
        return scores.new_empty(*scores.shape[:-1], 0, dtype=torch.int64)
    return torch.cat(rounds, dim=-1)


def _by_topk(scores: Tensor, picks: int) -> Tensor:
    """`first_best` by torch's topk, which leaves open which of several equal scores it takes.

    So one more than asked for is taken, and rows with equal scores among these are sorted.
    """
    values, best = scores.topk(min(picks + 1, scores.shape[-1]))
    equal = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] > -torch.inf)
    tied = equal.any(-1)
    if tied.any():
        order = scores[tied].sort(dim=-1, descending=True, stable=True).indices
        best[tied] = order[..., : best.shape[-1]]
    return best[..., :picks]
