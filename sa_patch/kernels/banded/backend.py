"""Backend `banded`: pure torch on any device, O(n w) time, O(n) memory, differentiable.

Tiles of queries meet the keys that some of them see, many tiles to a call of torch's own fused
attention or of its matrix products: bands of keys for first tokens and windows (`sliding_window`),
bands of slots for stochastic attention (`slots`), ranges of a ring for its prefix-stable kin
and in unions (`ring`), chosen blocks (`chosen_blocks`). Unions are made of disjoint parts
(`union`). Patterns without a rule of their own, and unions with them, are asked tile by tile
(`by_definition`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans, any_softmax
from sa_patch.kernels.banded.by_definition import attend_by_definition
from sa_patch.kernels.banded.chosen_blocks import attend_blocks
from sa_patch.kernels.banded.decode import gather_blocks
from sa_patch.kernels.banded.sliding_window import attend_local_window
from sa_patch.kernels.banded.slots import attend_ring
from sa_patch.kernels.banded.union import attend_union
from sa_patch.kernels.local_window import LocalWindow, joined, local_window_of
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, parts_of

_PARTS = (Full, SWA, SA, MoBA, Sinks, PSA, BlockTopK)


def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
    return True, ""


def attend(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    spans: Spans,
    scale: float,
    softmax: Softmax = PLAIN,
) -> Tensor:
    # Torch's own attention knows the plain softmax alone.
    prefill = q.shape[2] == k.shape[2] and not any(spans.starts) and softmax is PLAIN
    if prefill and pattern.saturated(max(spans.lengths)):
        # Causality alone hides right padding from every real query.
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=_grouped(q, k)
        )
    if prefill and pattern.bounded_reach is not None and _has_rules(pattern):
        return _attend_local_window(pattern, q, k, v, start=0, scale=scale)
    if prefill and min(spans.lengths) == q.shape[2]:
        return _attend_rows(pattern, q, k, v, layer=layer, start=0, scale=scale)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for (length, start), members in spans.groups().items():
        count = min(q.shape[2], length - start)
        if count <= 0:
            continue
        rows = torch.tensor(members, device=q.device)
        part = _attend_rows(
            pattern,
            q[rows, :, :count],
            k[rows, :, :length],
            v[rows, :, :length],
            layer=layer,
            start=start,
            scale=scale,
            softmax=softmax,
        )
        padded = torch.nn.functional.pad(part, (0, 0, 0, q.shape[2] - count))
        out = out.index_copy(0, rows, padded)
    return out


def _attend_rows(
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
    """Rows of one length n: queries at ``start .. start + nq - 1``, keys at ``0 .. n - 1``."""
    seq_len, queries = k.shape[2], q.shape[2]
    if not _has_rules(pattern):
        own: dict[str, Any] = {"layer": layer, "start": start, "scale": scale, "softmax": softmax}
        return attend_by_definition(pattern, q, k, v, **own)
    if softmax is not PLAIN:
        shown = SWA(seq_len) if pattern.saturated(seq_len) else pattern
        return attend_union(shown, q, k, v, layer=layer, start=start, scale=scale, softmax=softmax)
    if pattern.saturated(seq_len):
        return _attend_local_window(SWA(seq_len), q, k, v, start=start, scale=scale)
    if pattern.bounded_reach is not None:
        return _attend_local_window(pattern, q, k, v, start=start, scale=scale)
    if isinstance(pattern, MoBA):
        if queries < pattern.block_size:
            return gather_blocks(pattern, q, k, v, start=start, scale=scale)
        return attend_blocks(pattern, q, k, v, start=start, scale=scale)
    if isinstance(pattern, SA) and queries == seq_len:
        return attend_ring(pattern, q, k, v, layer=layer, scale=scale)
    return attend_union(pattern, q, k, v, layer=layer, start=start, scale=scale)


def _has_rules(pattern: Pattern) -> bool:
    """Whether there are faster ways than the definition for all parts of a pattern."""
    return all(isinstance(part, _PARTS) for part in parts_of(pattern))


def _attend_local_window(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, start: int, scale: float
) -> Tensor:
    """First tokens and windows alone."""
    local_window: LocalWindow = joined([local_window_of(part) for part in parts_of(pattern)])
    return attend_local_window(local_window, q, k, v, start=start, scale=scale, sums=False)[0]


def _grouped(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]


BACKEND = Backend(
    name="banded",
    summary="pure torch, any device: tiles of queries against the keys they may see, O(n w)",
    supports=supports,
    attend=attend,
    refuses=any_softmax,
)
