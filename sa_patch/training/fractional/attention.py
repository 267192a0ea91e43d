"""Fractional neural attention as a function of tensors: dense, or over the pairs of a pattern."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.kernels import Spans
from sa_patch.kernels.inputs import autocasts, check_tensors
from sa_patch.patching.mask import Packing
from sa_patch.patterns import Full, Pattern
from sa_patch.patterns.visible_pairs import check_pairs, draws_of
from sa_patch.training.fractional.distance_kernel import DistanceKernel
from sa_patch.training.fractional.pairs import attend_pairs


def fractional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float,
    *,
    geometry: str = "euclidean",
    bandwidth: float | str = 1.0,
    density: float = 0.0,
    exclude_self: bool = False,
    causal: bool = True,
    lengths: Tensor | None = None,
    padding: Tensor | None = None,
    pattern: Pattern | None = None,
    layer: int = 0,
) -> Tensor:
    """Attention by distance of queries and keys (Qu, Ly & Gong, arXiv 2511.10208).

    See `DistanceKernel` for the weights. Computed in float32 at least, under `torch.autocast`
    too. Without a pattern all pairs are computed, O(n^2); with one only the visible pairs, in
    O(n w) time and memory.

    Under a causal mask `density` and ``bandwidth="median"`` still let later tokens change earlier
    outputs, through the columns' sums and the median: they are for encoders.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``. Fewer queries than keys are the last ones of each
            sequence.
        k, v: ``[batch, kv_heads, n, head_dim]``; `q_heads` is a multiple of `kv_heads`, and v may
            have vectors of another length.
        alpha, geometry, bandwidth, density: see `DistanceKernel`.
        exclude_self: no token sees itself, as with shared queries and keys.
        causal: whether a query sees keys at and before its own position only.
        lengths: integers ``[batch]``, the real tokens of right-padded rows; all n by default.
        padding: instead of `lengths`, bool ``[batch, n]``, True at real tokens, wherever they are;
            then nq must be n.
        pattern: which keys are visible; None for all.
        layer: index of the layer, for patterns drawn anew in each layer.

    Returns:
        ``[batch, q_heads, nq, v's head_dim]`` in q's dtype; zero at padding and for a query that
        sees no key (the first one of a causal sequence with `exclude_self`).

    Raises:
        UserError: for values or shapes that do not fit, a pattern that chooses by content or gives
            each head one of its own, or one without a symmetric form where `causal` is False.
    """
    kernel = DistanceKernel(alpha, geometry, bandwidth, density)
    _check(q, k, v, kernel, lengths, padding)
    check_pattern(pattern, causal)
    if padding is not None:
        packing = Packing.of(padding.bool(), q.shape[0], 0, k.shape[2])
    else:
        packing = Packing(Spans.of(q, k, lengths), None, None)
    out = attend_fractional(
        kernel,
        packing.pack(q, packing.query_order),
        packing.pack(k, packing.key_order),
        packing.pack(v, packing.key_order),
        spans=packing.spans,
        exclude_self=exclude_self,
        causal=causal,
        pattern=pattern,
        layer=layer,
    )
    return packing.unpack(out)


def attend_fractional(
    kernel: DistanceKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: Spans,
    exclude_self: bool = False,
    causal: bool = True,
    pattern: Pattern | None = None,
    layer: int = 0,
) -> Tensor:
    """`fractional_attention` of right-padded rows; `spans` has their lengths and first queries.

    Raises:
        UserError: for packed rows.
    """
    if spans.packed_in is not None:
        raise UserError(
            "a model with fractional attention takes one sequence per row; give no position_ids "
            "that start anew, and no cu_seq_lens_q"
        )
    if not q.shape[0] or not q.shape[2]:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (q, k, v))
    # Autocast would compute matrix products in half precision again.
    with torch.autocast(q.device.type, enabled=False) if autocasts(q.device) else nullcontext():
        out = _attend_rows(kernel, q, k, v, spans, exclude_self, causal, pattern, layer)
    return out.to(dtype)


def _attend_rows(
    kernel: DistanceKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    exclude_self: bool,
    causal: bool,
    pattern: Pattern | None,
    layer: int,
) -> Tensor:
    """`attend_fractional` in the inputs' own precision."""
    batch, heads, queries, _ = q.shape
    hidden_q = spans.padded_queries(queries, q.device)
    hidden_k = spans.padded_keys(k.shape[2], k.device)
    # Padding may hold anything, even NaN, and 0 * NaN would reach real rows.
    if hidden_q is not None:
        q = q.masked_fill(hidden_q[:, None, :, None], 0)
    if hidden_k is not None:
        k, v = (x.masked_fill(hidden_k[:, None, :, None], 0) for x in (k, v))
    if pattern is None or isinstance(pattern, Full):
        seen = _visible(spans, queries, k.shape[2], causal, exclude_self, q.device)
        grouped = q.unflatten(1, (k.shape[1], -1))
        out = _dense(kernel, grouped, k[:, :, None], v[:, :, None], seen[:, None, None])
        return out.flatten(1, 2)
    rows: list[Tensor] = [q] * batch
    for (length, start), members in spans.groups().items():
        real = max(0, min(length - start, queries))
        group = heads // k.shape[1]
        draws = draws_of(pattern, heads)
        parts = []
        for draw in range(draws):
            own = slice(draw, draw + 1) if draws > 1 else slice(None)
            shared = slice(draw // group, draw // group + 1) if draws > 1 else slice(None)
            parts.append(
                attend_pairs(
                    kernel,
                    q[members, own, :real],
                    k[members, shared, :length],
                    v[members, shared, :length],
                    pattern,
                    start=start,
                    layer=layer,
                    head=draw,
                    causal=causal,
                    exclude_self=exclude_self,
                )
            )
        joined = torch.cat(parts, dim=1)
        joined = torch.nn.functional.pad(joined, (0, 0, 0, queries - real))
        for row, one in zip(members, joined, strict=True):
            rows[row] = one
    return torch.stack(rows)


def check_pattern(pattern: Pattern | None, causal: bool = True) -> None:
    """Raise `UserError` for a pattern that fractional attention cannot follow."""
    if pattern is None:
        return
    if pattern.reads_content:
        raise UserError(
            f"{pattern} chooses keys by dot products, which fractional attention does not compute; "
            "take full, swa, sa, psa, sinks, tail or a union of them"
        )
    check_pairs(pattern, causal)


def _dense(kernel: DistanceKernel, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """All pairs: q ``[..., nq, head_dim]``, k, v ``[..., n, head_dim]``, seen ``[..., nq, n]``."""
    g = kernel.distances(q, k)
    kappa: Tensor | float
    if kernel.bandwidth == "median":
        shown = g.detach().masked_fill(~seen, torch.nan).flatten(-2)
        median = shown.nanmedian(-1).values[..., None, None]
        # Where nothing is visible the median is NaN, which is not above 0.
        kappa = median.where(median > 0, 1)
    else:
        kappa = float(kernel.bandwidth)
    logs = kernel.log_weights(g, q.shape[-1], kappa)
    hidden = torch.finfo(logs.dtype).min / 4
    if kernel.density:
        # By the columns' sums alone: a row's own sum cancels when the row is normalized.
        logs = logs - kernel.density * logs.masked_fill(~seen, hidden).logsumexp(-2, keepdim=True)
    out = logs.masked_fill(~seen, hidden).softmax(-1) @ v
    # A query without visible keys has attended to all of them alike.
    return out.masked_fill(~seen.any(-1, keepdim=True), 0)


def _visible(
    spans: Spans, queries: int, keys: int, causal: bool, exclude_self: bool, device: torch.device
) -> Tensor:
    """bool ``[batch, nq, n]``; False for padding, as query and as key."""
    lengths = torch.tensor(spans.lengths, device=device)[:, None, None]
    starts = torch.tensor(spans.starts, device=device)[:, None, None]
    i = starts + torch.arange(queries, device=device)[None, :, None]
    j = torch.arange(keys, device=device)[None, None]
    seen = (i < lengths) & (j < lengths)
    if causal:
        seen = seen & (j <= i)
    return seen & (i != j) if exclude_self else seen


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: DistanceKernel,
    lengths: Tensor | None,
    padding: Tensor | None,
) -> None:
    check_tensors(q, k, v, same_width=False)
    kernel.check_head_dim(q.shape[3])
    if q.shape[2] < k.shape[2] and kernel.depends_on_all_queries:
        raise UserError("density and bandwidth='median' need all queries, as many as keys")
    if padding is None:
        return
    if lengths is not None:
        raise UserError("give lengths or padding, not both")
    if tuple(padding.shape) != (k.shape[0], k.shape[2]) or q.shape[2] != k.shape[2]:
        raise UserError(
            f"padding must be [batch, n], {[k.shape[0], k.shape[2]]}, with as many queries as "
            f"keys, got {tuple(padding.shape)} and {q.shape[2]} queries"
        )
