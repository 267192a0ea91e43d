"""FlexAttention's lists and mask walked in plain torch, in place of compiling them.

Everything that FlexAttention compiles takes seconds, so that the compiled kernel is tested on a few
shapes in tests/kernels/flex, and for its memory in tests/laws/test_cost.py. Elsewhere its place is
taken by what it is to compute: a pair is seen if its block is listed as wholly visible, or listed
and named by the mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sa_patch.kernels.flex import kernel
from sa_patch.kernels.flex.plan import Structure, block_size


@pytest.fixture
def walked_lists() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_compiled", walk)
        yield


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: tuple[Tensor, ...],
    tables: Tensor,
    structure: Structure,
    scale: float,
) -> Tensor:
    """What `kernel._attend` computes, block by block as its lists say; all n x n scores at once."""
    batch, head, i, j = (
        torch.arange(count).view([-1 if place == axis else 1 for place in range(4)])
        for axis, count in enumerate((*q.shape[:3], k.shape[2]))
    )
    size = block_size(q.device)
    partly, wholly = (listed(lists[at], lists[at + 1], q, k, size) for at in (0, 2))
    assert not (partly & wholly).any(), "a block is in both lists"
    seen = wholly | partly & kernel.mask_function(tables, structure)(batch, head, i, j)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.float() @ keys.transpose(-1, -2)).mul(scale).masked_fill(~seen, -torch.inf)
    # A query that sees nothing gets zeros.
    return (scores.softmax(-1).nan_to_num(nan=0.0) @ values).to(q.dtype)


def listed(counts: Tensor, blocks: Tensor, q: Tensor, k: Tensor, size: int) -> Tensor:
    """Pairs in listed blocks, each of them once: bool ``[batch, q_heads, nq, n]``."""
    places = torch.arange(blocks.shape[-1]) < counts[..., None]
    spare = -(-k.shape[2] // size)
    times = torch.zeros(*blocks.shape[:-1], spare + 1, dtype=torch.int64)
    times.scatter_add_(-1, blocks.long().where(places, spare), places.long())
    assert times[..., :spare].max() <= 1, "a block is listed twice"
    pairs = times[..., :spare].bool().repeat_interleave(size, -1).repeat_interleave(size, -2)
    return pairs[..., : q.shape[2], : k.shape[2]].expand(*q.shape[:3], k.shape[2])
