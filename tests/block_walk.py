"""Block plans walked in plain torch, in place of the kernels that walk them.

A pair is seen if its block is listed as wholly visible, or listed and named by the mask: the mask
is not asked in wholly visible blocks, as in the kernels. Everything that FlexAttention or
FlashAttention-4 compiles takes seconds or a GPU, so that this takes their place in most tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sa_patch.kernels.backend import Softmax
from sa_patch.kernels.flex import kernel
from sa_patch.kernels.plans.block_lists import Blocks, Lists
from sa_patch.kernels.plans.mask import mask_function
from sa_patch.kernels.plans.pages import PagedPlan, paged_mask
from sa_patch.kernels.plans.tables import Structure

PAGES_READ: list[float] = []
"""Keys that a sequence read in each call, a mean."""
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture
def walked_lists() -> Iterator[None]:
    """Backend `flex` without compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_compiled", walk_flex)
        yield


def walk_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    tables: Tensor,
    structure: Structure,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """What `flex.kernel._attend` computes."""
    blocks = kernel.blocks_on(q.device)
    return walk(q, k, v, lists, mask_function(tables, structure), blocks, scale, softcap)[0]


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    mask: Mask,
    blocks: Blocks,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention over listed blocks, and the log-sum-exp; all n x n scores at once.

    Args:
        q: ``[batch, q_heads, nq, head_dim]``.
        k, v: ``[batch, kv_heads, n, head_dim]``.
        mask: of indices into these.
        blocks: rows of q, and keys, of one block.
    """
    batch, head, i, j = (
        torch.arange(count).view([-1 if place == axis else 1 for place in range(4)])
        for axis, count in enumerate((*q.shape[:3], k.shape[2]))
    )
    partly = listed(lists.counts, lists.blocks, q, k, blocks)
    wholly = listed(lists.whole_counts, lists.whole_blocks, q, k, blocks)
    assert not (partly & wholly).any(), "a block is in both lists"
    seen = wholly | partly & mask(batch, head, i, j)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = Softmax(softcap).cap((q.float() @ keys.transpose(-1, -2)).mul(scale))
    scores = scores.masked_fill(~seen, -torch.inf)
    # A query that sees nothing gets zeros.
    out = (scores.softmax(-1).nan_to_num(nan=0.0) @ values).to(q.dtype)
    return out, scores.logsumexp(-1)


def listed(counts: Tensor, columns: Tensor, q: Tensor, k: Tensor, blocks: Blocks) -> Tensor:
    """Pairs in listed blocks, each of them once: bool ``[batch, q_heads, nq, n]``."""
    assert counts.max() <= columns.shape[-1], "a list is narrower than what it counts"
    places = torch.arange(columns.shape[-1]) < counts[..., None]
    ascending = columns.diff(dim=-1) > 0
    assert ascending[places[..., 1:]].all(), "a list does not ascend"
    spare = -(-k.shape[2] // blocks.keys)
    times = torch.zeros(*columns.shape[:-1], spare + 1, dtype=torch.int64)
    times.scatter_add_(-1, columns.long().where(places, spare), places.long())
    pairs = times[..., :spare].bool().repeat_interleave(blocks.keys, -1)
    pairs = pairs.repeat_interleave(blocks.queries, -2)
    return pairs[..., : q.shape[2], : k.shape[2]].expand(*q.shape[:3], k.shape[2])


def read_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    plan: PagedPlan,
    group: int,
    blocks: Blocks,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """A kernel of paged keys: every sequence reads whole steps of the pages in its row."""
    sequences, _, rows, _ = q.shape
    used = plan.used.flatten()
    assert page_table.dtype == used.dtype == torch.int32 and len(page_table) == len(used)
    assert page_table.min() >= 0 and page_table.max() < len(k), "a page is not there"
    assert (used % blocks.keys == 0).all() and used.max() <= page_table.shape[1] * plan.page
    read = int(used.max())
    PAGES_READ.append(float(used.float().mean()))
    place = torch.arange(read)
    keys, values = (x[page_table.long(), :, 0].flatten(1, 2)[:, :read].float() for x in (k, v))
    assert keys.isfinite().all(), "a page reaches behind the last key"
    number, tables = plan.numbers, plan.tables
    seen = paged_mask(
        plan.page,
        plan.shared,
        lambda which: number[which],
        lambda index: tables[index.long()],
        lambda truth: truth * 1,
        torch.arange(sequences)[:, None, None],
        torch.arange(rows)[:, None] // group,
        place,
    )
    seen = seen & (place < used[:, None, None])
    scores = Softmax(softcap).cap((q[:, 0].float() @ keys.transpose(1, 2)).mul(scale))
    scores = scores.masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1).nan_to_num(nan=0.0) @ values).to(q.dtype)
    return out[:, None], scores.logsumexp(-1)[:, None]
