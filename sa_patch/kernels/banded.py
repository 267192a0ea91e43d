"""Backend `banded`: pure torch on any device, O(n w) time and memory, differentiable.

Sliding windows are bands of the attention matrix; stochastic attention is a band once rows are
ordered by slot, closed to a ring where the pattern is circular. Blocks of queries meet the
contiguous band of keys around them. MoBA gathers the chosen blocks of each query
(`block_gather`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sa_patch.kernels.backend import Backend, Spans
from sa_patch.kernels.block_gather import attend_blocks
from sa_patch.patterns import SA, SWA, Full, MoBA, Pattern

# Queries that share one band of keys: large enough that matrix products dominate the loop.
_BLOCK = 256
# Elements of gathered keys held at once when queries do not form a band.
_GATHER_ELEMENTS = 1 << 22


def supports(pattern: Pattern, q: Tensor, k: Tensor) -> tuple[bool, str]:
    if isinstance(pattern, (Full, SWA, SA, MoBA)):
        return True, ""
    return False, f"banded has no rule for the pattern {pattern.name!r}"


def attend(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, layer: int, spans: Spans, scale: float
) -> Tensor:
    prefill = q.shape[2] == k.shape[2] and not any(spans.starts)
    if prefill and pattern.saturated(max(spans.lengths)):
        # Causality alone hides right padding from every real query.
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=_grouped(q, k)
        )
    if prefill and isinstance(pattern, SWA):
        return _window_rows(q, k, v, start=0, window=pattern.window, scale=scale)
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
        )
        padded = torch.nn.functional.pad(part, (0, 0, 0, q.shape[2] - count))
        out = out.index_copy(0, rows, padded)
    return out


def _attend_rows(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, layer: int, start: int, scale: float
) -> Tensor:
    """Rows of one length n: queries at ``start .. start + nq - 1``, keys at ``0 .. n - 1``."""
    seq_len, queries = k.shape[2], q.shape[2]
    if isinstance(pattern, MoBA) and not pattern.saturated(seq_len):
        return attend_blocks(pattern, q, k, v, start=start, scale=scale)
    if isinstance(pattern, SWA):
        return _window_rows(q, k, v, start=start, window=pattern.window, scale=scale)
    if isinstance(pattern, SA) and not pattern.saturated(seq_len):
        if start == 0 and queries == seq_len:
            return _ring_band(pattern, q, k, v, layer=layer, scale=scale)
        return _ring_gather(pattern, q, k, v, layer=layer, start=start, scale=scale)
    return _window_rows(q, k, v, start=start, window=seq_len, scale=scale)


def _grouped(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] != k.shape[1]


def _window_rows(
    q: Tensor, k: Tensor, v: Tensor, *, start: int, window: int, scale: float
) -> Tensor:
    """The nearest `window` keys of queries at ``start + 0 .. start + nq - 1``."""
    blocks = []
    for first in range(0, q.shape[2], _BLOCK):
        block = q[:, :, first : first + _BLOCK]
        begin = start + first
        end = begin + block.shape[2]
        low = max(0, begin - window + 1)
        behind = torch.arange(begin, end, device=q.device)[:, None] - torch.arange(
            low, end, device=q.device
        )
        blocks.append(
            scaled_dot_product_attention(
                block,
                k[:, :, low:end],
                v[:, :, low:end],
                attn_mask=(behind >= 0) & (behind < window),
                scale=scale,
                enable_gqa=_grouped(q, k),
            )
        )
    return torch.cat(blocks, dim=2)


def _ring_band(pattern: SA, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
    """Stochastic attention of whole sequences: a band once rows are ordered by slot."""
    heads, seq_len, reach = q.shape[1], q.shape[2], pattern.window - 1
    order = pattern.order(seq_len, layer, heads, q.device)
    slots = pattern.slots(seq_len, layer, heads, q.device)
    # Slots -reach .. n - 1 + reach: on the ring they wrap, on a line the ends are masked off.
    band = torch.arange(-reach, seq_len + reach, device=q.device)
    inside = torch.ones_like(band, dtype=torch.bool)
    if not pattern.circular:
        inside = (band >= 0) & (band < seq_len)
    band_order = order[:, band % seq_len]
    q_slots, k_band, v_band = _take(q, order), _take(k, band_order), _take(v, band_order)
    blocks = []
    for first in range(0, seq_len, _BLOCK):
        last = min(first + _BLOCK, seq_len)
        keys = slice(first, last + 2 * reach)
        step = torch.arange(last - first + 2 * reach, device=q.device) - torch.arange(
            last - first, device=q.device
        ).unsqueeze(1)
        near = (step >= 0) & (step <= 2 * reach) & inside[keys]
        causal = band_order[:, None, keys] <= order[:, first:last, None]
        blocks.append(
            scaled_dot_product_attention(
                q_slots[:, :, first:last],
                k_band[:, :, keys],
                v_band[:, :, keys],
                attn_mask=(near & causal)[None],
                scale=scale,
                enable_gqa=q.shape[1] != k_band.shape[1],
            )
        )
    return _take(torch.cat(blocks, dim=2), slots)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [batch, heads, n, head_dim]`` by ``index [draws, m]``.

    One draw serves all heads as they are. With a draw for every query head, KV heads are
    repeated to the query heads first: each copy is ordered differently.
    """
    if len(index) == 1:
        return x[:, :, index[0]]
    x = x.repeat_interleave(len(index) // x.shape[1], dim=1)
    return x.gather(2, index[None, :, :, None].expand(len(x), -1, -1, x.shape[3]))


def _ring_gather(
    pattern: SA, q: Tensor, k: Tensor, v: Tensor, *, layer: int, start: int, scale: float
) -> Tensor:
    """Stochastic attention of the last queries of a sequence: each gathers its own window."""
    heads, queries = q.shape[1:3]
    seq_len, reach = k.shape[2], pattern.window - 1
    order = pattern.order(seq_len, layer, heads, q.device)
    slots = pattern.slots(seq_len, layer, heads, q.device)
    offsets = torch.arange(-reach, reach + 1, device=q.device)
    positions = torch.arange(start, start + queries, device=q.device)
    width = len(offsets)
    step = max(1, _GATHER_ELEMENTS // (width * heads * q.shape[0] * q.shape[3]))
    blocks = []
    for first in range(0, queries, step):
        chunk = positions[first : first + step]
        band = slots[:, chunk, None] + offsets
        keys = torch.stack([draw[near % seq_len] for draw, near in zip(order, band, strict=True)])
        seen = keys <= chunk[:, None]
        if not pattern.circular:
            seen = seen & (band >= 0) & (band < seq_len)
        flat = keys.flatten(1)
        k_near = _take(k, flat).unflatten(2, (len(chunk), width))
        v_near = _take(v, flat).unflatten(2, (len(chunk), width))
        group = heads // k_near.shape[1]
        # Each query is its own attention problem over `width` keys; a KV head's queries share it.
        part = q[:, :, first : first + step].unflatten(1, (k_near.shape[1], group)).transpose(2, 3)
        mask = seen[None, :, :, None, :]
        blocks.append(
            scaled_dot_product_attention(part, k_near, v_near, attn_mask=mask, scale=scale)
            .transpose(2, 3)
            .flatten(1, 2)
        )
    return torch.cat(blocks, dim=2)


BACKEND = Backend(
    name="banded",
    summary="pure torch, any device: blocks of queries against their band of keys, O(n w)",
    supports=supports,
    attend=attend,
)
