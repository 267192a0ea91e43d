"""Backend `reference`: the pattern's own definition as a dense mask, through torch's SDPA.

O(n^2) memory: the oracle that every other backend is tested against, and the fastest on short
sequences, where a mask is small and loops cost more than they save.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.backend import PLAIN, Backend, Softmax, Spans, any_softmax, as_scored
from sa_patch.kernels.merge import attend_with_lse
from sa_patch.patterns import Full, Pattern


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
    if softmax is not PLAIN:
        mask = visibility(pattern, as_scored(pattern, q, scale), k, layer=layer, spans=spans)
        out, lse = attend_with_lse(q, k, v, mask, scale, softcap=softmax.softcap)
        return softmax.share(out, lse).to(q.dtype)
    square = q.shape[2] == k.shape[2] and not any(spans.starts)
    if square and (isinstance(pattern, Full) or pattern.saturated(max(spans.lengths))):
        # Causality alone hides right padding from every real query.
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    mask = visibility(pattern, as_scored(pattern, q, scale), k, layer=layer, spans=spans)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def visibility(pattern: Pattern, q: Tensor, k: Tensor, *, layer: int, spans: Spans) -> Tensor:
    """The mask of a batch: bool ``[batch, q_heads or 1, nq, n]``.

    Padding queries see key 0, so that no row of the softmax is empty.
    """
    batch, heads, query_len = q.shape[:3]
    rows: list[Tensor] = [q.new_empty(0)] * batch
    for (length, start), members in spans.groups().items():
        positions = torch.arange(start, max(start, min(start + query_len, length)), device=q.device)
        if pattern.reads_content:
            masks = [
                pattern.visible(
                    positions,
                    length,
                    layer=layer,
                    heads=heads,
                    q=q[row, :, : len(positions)],
                    k=k[row, :, :length],
                )
                for row in members
            ]
        else:
            masks = [pattern.visible(positions, length, layer=layer, heads=heads)] * len(members)
        for row, mask in zip(members, masks, strict=True):
            rows[row] = _pad(mask, query_len, k.shape[2])
    return torch.stack(rows)


def _pad(mask: Tensor, query_len: int, key_len: int) -> Tensor:
    """Extend bool ``[heads or 1, queries, keys]`` to the padded sizes."""
    if mask.shape[1:] == (query_len, key_len):
        return mask
    full = mask.new_zeros(mask.shape[0], query_len, key_len)
    full[:, : mask.shape[1], : mask.shape[2]] = mask
    full[:, mask.shape[1] :, 0] = True
    return full


BACKEND = Backend(
    name="reference",
    summary="dense mask through torch's SDPA: any device, O(n^2) memory; the oracle",
    supports=supports,
    attend=attend,
    refuses=any_softmax,
)
