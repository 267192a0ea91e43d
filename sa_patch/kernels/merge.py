"""Attention over disjoint sets of keys, joined by the log-sum-exp of their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sa_patch.kernels.backend import Softmax
from sa_patch.kernels.tiling import needs_gradients

# Below this a log-sum-exp holds nothing but hidden scores.
_NOTHING_SEEN = -(2.0**90)


def hidden_score(dtype: torch.dtype) -> float:
    """What hides a key when added to its score: finite, and a power of two where it can be.

    Not -inf: torch's fused CPU kernel returns a log-sum-exp of 0 for a query all of whose scores
    are -inf, as if it had seen something.
    """
    return max(-(2.0**100), torch.finfo(dtype).min)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over all keys of the parts, no two of which hold the same key of a query.

    Args:
        parts: for each its output ``[batch, q_heads, nq, head_dim]``, finite everywhere, and the
            natural log-sum-exp of its visible scaled scores ``[batch, q_heads, nq]`` in fp32;
            -inf, or hugely negative, where a query sees no key of the part.

    Returns:
        Like an output, computed in fp32 at least; zero where a query sees nothing at all.
    """
    (out, lse), *others = parts
    if not others:
        return out
    peak = lse.detach()
    for _, other in others:
        peak = torch.maximum(peak, other.detach())
    peak = peak.clamp(min=_NOTHING_SEEN)
    weights = [(part_lse - peak).exp()[..., None] for _, part_lse in parts]
    # The largest part weighs 1, so that less than that means none at all.
    total = sum(weights[1:], weights[0]).clamp(min=0.5)
    joined = out * (weights[0] / total)
    for (part, _), weight in zip(others, weights[1:], strict=True):
        joined = _plus(joined, part, weight / total)
    return joined.to(out.dtype)


def _plus(joined: Tensor, part: Tensor, weight: Tensor) -> Tensor:
    """``joined + part * weight`` in one pass over memory."""
    part = part.to(joined.dtype)
    if needs_gradients(joined, part, weight):
        return torch.addcmul(joined, part, weight)
    return joined.addcmul_(part, weight)


def attend_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of tiles, with the log-sum-exp of the scores.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``.
        k, v: ``[batch, kv_heads, keys, head_dim]``; `q_heads` is a multiple of `kv_heads`.
        bias: what is added to the scores, broadcastable to ``[batch, q_heads, nq, keys]``, with two
            dimensions or four: a bool mask of what is visible, or numbers like q's with
            `hidden_score` for what is not (never -inf).
        causal: whether query i sees the keys ``0 .. i`` alone; then `bias` must be None.
        softcap: of `Softmax`.

    Returns:
        The output, shaped like q, and the log-sum-exp ``[batch, q_heads, nq]``, both fp32 at least
        and differentiable. A query that sees nothing has -inf and any finite output.
    """
    # An output rounded to half precision before it is merged would be rounded twice.
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = hidden_score(q.dtype)
    if not q.numel() or not k.numel():
        # The kernel would divide by zero, and stop the process.
        return (q * 0).to(wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    on_cpu = q.device.type == "cpu" and not needs_gradients(q, k, v) and softcap is None
    if causal and not on_cpu:
        bias = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=wide).masked_fill_(~bias, hidden)
    q, k, v = (x.to(wide) for x in (q, k, v))
    bias = None if bias is None else bias.to(wide)
    if on_cpu:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        out, lse = _explicit(q, k, v, bias, scale, softcap)
    return out, lse.masked_fill(lse < hidden / 2, -torch.inf)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`attend_with_lse` step by step."""
    kv_heads = k.shape[1]
    scores = q.unflatten(1, (kv_heads, -1)) @ (k * scale)[:, :, None].transpose(-1, -2)
    scores = Softmax(softcap).cap(scores.flatten(1, 2))
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().unflatten(1, (kv_heads, -1))
    return (weights @ v[:, :, None]).flatten(1, 2), lse
