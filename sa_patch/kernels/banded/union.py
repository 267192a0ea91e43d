"""Patterns in disjoint parts, merged: a local window, what is drawn, what is chosen by content.

Each part hides what the parts before it show.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sa_patch.kernels.backend import PLAIN, Softmax
from sa_patch.kernels.banded.choices import choose, chosen_rule, parts_of_queries
from sa_patch.kernels.banded.chosen_blocks import attend_chosen
from sa_patch.kernels.banded.ring import RingPart, attend_ranges
from sa_patch.kernels.banded.sliding_window import attend_local_window
from sa_patch.kernels.local_window import LocalWindow, joined, local_window_of
from sa_patch.kernels.merge import merge
from sa_patch.patterns import PSA, SA, BlockTopK, MoBA, Pattern, parts_of
from sa_patch.patterns.base import Rule


def attend_union(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    start: int,
    scale: float,
    softmax: Softmax = PLAIN,
) -> Tensor:
    """Attention of queries at ``start .. start + nq - 1`` over what the parts of a pattern show.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``; rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``, ``n = start + nq``.

    Returns:
        ``[batch, q_heads, nq, head_dim]``. Memory O(n): an output for every part, besides what
        the kernels of parts hold.
    """
    parts = parts_of(pattern)
    local_window = joined([local_window_of(part) for part in parts])
    drawn = [part for part in parts if isinstance(part, (SA, PSA))]
    chosen = [part for part in parts if isinstance(part, (MoBA, BlockTopK)) and _chooses(part)]
    has_window = local_window.sinks > 0 or local_window.reach >= 0
    sums = has_window + len(drawn) + len(chosen) > 1 or softmax is not PLAIN
    inputs: dict[str, Any] = {"start": start, "scale": scale, "softcap": softmax.softcap}
    disjoint_parts: list[tuple[Tensor, Tensor | None]] = []
    hidden: list[Rule] = []
    if has_window:
        disjoint_parts.append(attend_local_window(local_window, q, k, v, sums=sums, **inputs))
    for part in drawn:
        part_on_ring = _ring_part(part, local_window, k.shape[2], layer, q, hidden)
        disjoint_parts.append(attend_ranges(part_on_ring, q, k, v, sums=sums, **inputs))
        hidden.append(part_on_ring.ring.rule())
    if chosen:
        # What a choice shows by itself, it does not choose as well.
        shown = local_window != local_window_of(chosen[0]) or len(chosen) > 1
        beside = local_window if shown else None
        disjoint_parts += _chosen_parts(chosen, q, k, v, beside=beside, hidden=hidden, **inputs)
    if not sums:
        return disjoint_parts[0][0]
    summed = [(out, lse) for out, lse in disjoint_parts if lse is not None]
    out = merge(summed)
    if softmax.sink is not None:
        out = softmax.share(out, torch.stack([lse for _, lse in summed]).logsumexp(0))
    return out.to(q.dtype)


def _chooses(part: MoBA | BlockTopK) -> bool:
    return part.topk > (1 if isinstance(part, MoBA) else 0)


def _ring_part(
    part: SA | PSA,
    local_window: LocalWindow,
    seq_len: int,
    layer: int,
    q: Tensor,
    hidden: list[Rule],
) -> RingPart:
    """What a ring shows beyond the local window and what `hidden` names."""
    positions = torch.arange(seq_len, device=q.device)
    return RingPart(
        ring=part.ring(seq_len, layer, q.shape[1], q.device),
        sinks=local_window.sinks,
        latest=torch.minimum(positions, local_window.first(positions) - 1),
        unless=_any_of(hidden),
        dense=part.window if isinstance(part, PSA) else 0,
    )


def _chosen_parts(
    chosen: Sequence[MoBA | BlockTopK],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    scale: float,
    softcap: float | None,
    beside: LocalWindow | None,
    hidden: list[Rule],
) -> list[tuple[Tensor, Tensor]]:
    """The chosen blocks of each part, without what other parts show or chose before it."""
    if beside is not None and (hidden or len(chosen) > 1):
        hidden, beside = [beside.sees, *hidden], None
    if len(chosen) == 1:
        left_out: dict[str, Any] = {"unless": _any_of(hidden), "beside": beside}
        inputs: dict[str, Any] = {"start": start, "scale": scale, "softcap": softcap}
        return [attend_chosen(chosen[0], q, k, v, **inputs, **left_out)]
    rows = []
    for row in range(len(q)):
        found = [
            _disjoint_choices(
                chosen,
                q[row, None, :, own],
                k[row, None, :, :end],
                v[row, None, :, :end],
                hidden,
                start=low,
                scale=scale,
                softcap=softcap,
            )
            for own, low, end in parts_of_queries(chosen, q[row], start)
        ]
        rows.append([_joined(same, 2) for same in zip(*found, strict=True)])
    return [_joined(same, 0) for same in zip(*rows, strict=True)]


def _disjoint_choices(
    chosen: Sequence[MoBA | BlockTopK],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: list[Rule],
    *,
    start: int,
    scale: float,
    softcap: float | None,
) -> list[tuple[Tensor, Tensor]]:
    """`_chosen_parts` of several parts, for queries of one row whose choices are held at once."""
    named = list(hidden)
    found = []
    inputs: dict[str, Any] = {"start": start, "scale": scale, "softcap": softcap}
    for part in chosen:
        picks = choose(part, q[0], k[0], start)
        left_out: dict[str, Any] = {"unless": _any_of(named), "picks": picks[None]}
        found.append(attend_chosen(part, q, k, v, **inputs, **left_out))
        named.append(chosen_rule(part, picks, start))
    return found


def _joined(parts: Sequence[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps side by side."""
    return torch.cat([out for out, _ in parts], dim), torch.cat([lse for _, lse in parts], dim)


def _any_of(rules: list[Rule]) -> Rule | None:
    """Whether any of them names a pair; None for none."""
    kept = tuple(rules)
    if len(kept) < 2:
        return kept[0] if kept else None
    return lambda i, j: reduce(torch.logical_or, (rule(i, j) for rule in kept))
