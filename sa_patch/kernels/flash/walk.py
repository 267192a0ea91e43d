"""Block plans on FlashAttention-4: a pattern in passes, each one call of its kernel.

The parts of a pattern that have rings are passes of their own, in the order of their rings, and are
joined by the log-sum-exp. Where content chooses, the query heads that share a KV head fill tiles
together, so that a tile holds few queries and its list is short. Small blocks that tiles of queries
share are read as pages (`paged.py`), all else by lists of whole key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sa_patch.kernels.backend import PLAIN, Softmax, Spans
from sa_patch.kernels.flash.paged import attend_pages, part_by_pages
from sa_patch.kernels.merge import merge
from sa_patch.kernels.plans.block_lists import Blocks, Lists
from sa_patch.kernels.plans.plan import Pass, Plan, passes, plan_of
from sa_patch.kernels.plans.rows import attend_by_length
from sa_patch.kernels.tiling import take_rows
from sa_patch.patterns import Pattern


class MaskKind(NamedTuple):
    """What a kernel is compiled for, besides shapes of models."""

    plan: Plan
    fold: int
    """query heads whose rows follow each other in the rows of a call, 1 for none"""
    kv_heads: int
    """of the model, where rows are folded: a row of the batch is a KV head then"""


Walked = Callable[..., tuple[Tensor, Tensor]]
"""A call of a kernel, to output and natural log-sum-exp."""


class Kernel(NamedTuple):
    """What computes passes."""

    lists: Walked
    """``(q, k, v, lists, mask, blocks, scale, softcap)``, with q ``[batch, q_heads, rows,
    head_dim]`` and k and v ``[batch, kv_heads, n, head_dim]``"""
    pages: Walked
    """as `PagedKernel`, and ``(blocks, scale, softcap)``"""


def attend_plans(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    scale: float,
    softmax: Softmax = PLAIN,
    blocks: Blocks,
    kernel: Kernel,
) -> Tensor:
    """Attention of whole rows of one length, or of any where the pattern is prefix-stable.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``, the last queries where they are fewer than the keys.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        blocks: rows of a tile, and keys, that the kernel takes at once.

    Returns:
        Like q.
    """
    group = q.shape[1] // k.shape[1]

    def attend_pass(given: Pass) -> tuple[Tensor, Tensor]:
        paged = part_by_pages(given, group, q.shape[2], k.shape[2], blocks)
        if paged is not None:

            def read(*args: Any) -> tuple[Tensor, Tensor]:
                return kernel.pages(*args, blocks, scale, softmax.softcap)

            return attend_pages(given, paged, q, k, v, blocks, read)
        fold = folded(given, group, blocks)
        own = blocks._replace(queries=blocks.queries // fold, heads=fold)
        plan = plan_of(given, q, k, layer=layer, blocks=own)

        def walked(*tensors: Tensor, lists: Lists, mask: MaskKind) -> tuple[Tensor, Tensor]:
            return kernel.lists(*tensors, lists, mask, blocks, scale, softmax.softcap)

        return _attend_lists(plan, q, k, v, fold, walked)

    parts = [attend_pass(given) for given in passes(pattern)]
    joined = merge(parts)
    if softmax.sink is None:
        return joined
    whole = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return softmax.share(joined, whole)


def walk_rows(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    spans: Spans,
    scale: float,
    softmax: Softmax = PLAIN,
    blocks: Blocks,
    kernel: Kernel,
) -> Tensor:
    """`attend_plans` for rows of any length; heads of any width."""
    head_dim = q.shape[3]
    # The kernels want rows of 16 bytes; zeros change neither scores nor the kept outputs.
    if head_dim % 8:
        q, k, v = (pad(x, (0, -head_dim % 8)) for x in (q, k, v))

    def rows(shown: Pattern, *tensors: Tensor) -> Tensor:
        return attend_plans(
            shown, *tensors, layer=layer, scale=scale, softmax=softmax, blocks=blocks, kernel=kernel
        )

    return attend_by_length(pattern, q, k, v, spans, rows)[..., :head_dim]


def folded(given: Pass, group: int, blocks: Blocks) -> int:
    """Query heads that fill tiles together in a pass, of a group that shares a KV head."""
    return group if given.choices and blocks.queries % group == 0 else 1


def _attend_lists(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: int,
    walked: Walked,
) -> tuple[Tensor, Tensor]:
    (batch, heads, count, _), kv_heads = q.shape, k.shape[1]
    mask = MaskKind(plan, fold, kv_heads if fold > 1 else 1)
    if fold > 1:
        rows = (
            q.unflatten(1, (kv_heads, fold))
            .transpose(2, 3)
            .reshape(batch * kv_heads, 1, count * fold, -1)
        )
        keys, values = (x.reshape(batch * kv_heads, 1, *x.shape[2:]) for x in (k, v))
        lists = Lists(*(_of_kv_heads(x, batch, kv_heads) for x in plan.lists))
        out, lse = walked(rows, keys, values, lists=lists, mask=mask)
        out = out.view(batch, kv_heads, count, fold, -1).transpose(2, 3).flatten(1, 2)
        return out, lse.view(batch, kv_heads, count, fold).transpose(2, 3).flatten(1, 2)
    each = heads // plan.lists.counts.shape[1] if plan.lists.counts.shape[1] > 1 else 1
    lists = Lists(*(x.repeat_interleave(each, dim=1) for x in plan.lists))
    if not plan.structure.ordered:
        return walked(q, k, v, lists=lists, mask=mask)
    rows = take_rows(q, plan.queries, heads)
    keys, values = (take_rows(x, plan.keys, heads) for x in (k, v))
    out, lse = walked(rows, keys, values, lists=lists, mask=mask)
    lse = take_rows(lse[..., None], plan.places, heads)[..., 0]
    return take_rows(out, plan.places, heads), lse


def _of_kv_heads(x: Tensor, batch: int, kv_heads: int) -> Tensor:
    """Lists ``[1 or batch, 1 or kv_heads, ..]`` of a batch whose rows are KV heads."""
    return x.expand(batch, kv_heads, *x.shape[2:]).flatten(0, 1)[:, None]
