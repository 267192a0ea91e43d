"""Few queries after many cached keys: each gathers the keys it sees, in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sa_patch.patterns.block_selection.block_means import block_means
from sa_patch.patterns.moba import MoBA

# Elements of gathered keys held at once: small enough to stay in a core's cache.
_GATHER_ELEMENTS = 1 << 19
# Scores of the choice that are held at once.
_SCORE_ELEMENTS = 1 << 22


def gather_blocks(
    pattern: MoBA, q: Tensor, k: Tensor, v: Tensor, *, start: int, scale: float
) -> Tensor:
    """Attention of queries at ``start .. start + nq - 1`` over own and chosen blocks.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``; rows of one length.
        k, v: ``[batch, kv_heads, n, head_dim]``.

    Returns:
        ``[batch, q_heads, nq, head_dim]``. Memory O(n w): no query holds more than its own keys.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, seq_len, size = k.shape[1], k.shape[2], pattern.block_size
    # Rows of a batch are independent problems, like heads: fold them together.
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    means = block_means(k, size)
    pad = (0, 0, 0, -seq_len % size)
    k_blocks = torch.nn.functional.pad(k, pad).unflatten(1, (-1, size))
    v_blocks = torch.nn.functional.pad(v, pad).unflatten(1, (-1, size))
    chosen_count = min(pattern.topk - 1, means.shape[1])
    gathered = len(q) * (chosen_count + 1) * size * head_dim
    ranked = len(q) * max(1, means.shape[1])
    step = max(1, min(_GATHER_ELEMENTS // gathered, _SCORE_ELEMENTS // ranked))
    kv_of_head = torch.arange(len(q), device=q.device) // (heads // kv_heads)
    parts = []
    for first in range(0, queries, step):
        part = q[:, first : first + step]
        positions = torch.arange(start + first, start + first + part.shape[1], device=q.device)
        own = positions // size
        picks = pattern.rank_blocks(part, means, own)
        own_column = own[None, :, None].expand(len(q), -1, 1)
        blocks = torch.cat([picks.clamp(min=0), own_column], dim=-1)
        seen_chosen = (picks >= 0)[..., None].expand(-1, -1, -1, size)
        offsets = torch.arange(size, device=q.device)
        seen_own = (offsets <= (positions % size)[:, None])[None, :, None].expand(len(q), -1, 1, -1)
        seen = torch.cat([seen_chosen, seen_own], dim=2).flatten(2)
        keys = k_blocks[kv_of_head[:, None, None], blocks].flatten(2, 3)
        values = v_blocks[kv_of_head[:, None, None], blocks].flatten(2, 3)
        # One product per query has no fp32 accumulator to round from: half precision would be
        # rounded between the steps, which fused kernels do not do.
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (keys.to(wide) @ part.to(wide)[..., None]).squeeze(-1) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append((weights[:, :, None] @ values.to(wide)).squeeze(2).to(q.dtype))
    return torch.cat(parts, dim=1).unflatten(0, (batch, heads))
