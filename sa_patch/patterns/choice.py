"""Picking the best of scored candidates, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many picks, one argmax for each is faster than a sort.
_ARGMAX_PICKS = 8


def first_best(scores: Tensor, picks: int) -> Tensor:
    """The `picks` largest scores of every row, largest first; of equal ones the first.

    Args:
        scores: ``[..., candidates]``, at least `picks` of them, without NaN. May be overwritten.

    Returns:
        int64 ``[..., picks]``.
    """
    if picks > _ARGMAX_PICKS:
        # A stable sort, unlike topk, settles equal scores by position on every device.
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :picks]
    # So does argmax, which finds the first of several, and is faster for few.
    rounds = []
    for _ in range(picks):
        rounds.append(scores.argmax(-1, keepdim=True))
        scores.scatter_(-1, rounds[-1], -torch.inf)
    if not rounds:
        return scores.new_empty(*scores.shape[:-1], 0, dtype=torch.int64)
    return torch.cat(rounds, dim=-1)
