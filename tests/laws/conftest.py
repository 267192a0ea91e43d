"""The laws hold of flex's lists and masks, which are walked here in plain torch.

Every family of shapes that FlexAttention compiles takes seconds, so that the compiled kernel is
tested on a few in tests/kernels/flex, and for its memory in test_cost. Here its place is taken by
what it is to compute: a pair is seen if its block is listed as wholly visible, or listed and named
by the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_patch.kernels.flex import kernel


@pytest.fixture(autouse=True)
def walked_lists(request: pytest.FixtureRequest) -> Iterator[None]:
    """Walk the lists of flex in place of compiling it."""
    if request.path.stem == "test_cost":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_attend", walk)
        for name in ("window", "ring", "content"):
            patch.setattr(kernel, name, getattr(kernel, f"_{name}"))
        yield


def walk(q: Tensor, k: Tensor, v: Tensor, call: kernel.Call, mask: Any) -> Any:
    """What `kernel._attend` computes, block by block as its lists say; all n x n scores at once."""
    size = kernel.block_size(q.device)
    if call.sentinel is not None:
        mask = kernel._or_sentinel(mask, call.sentinel)
    batch, head, i, j = (
        torch.arange(count).view([-1 if place == axis else 1 for place in range(4)])
        for axis, count in enumerate((*q.shape[:3], k.shape[2]))
    )
    partly = listed(call.lists[0], call.lists[1], q, k, size)
    seen = partly & mask(batch, head, i, j)
    if len(call.lists) > 2:
        wholly = listed(call.lists[2], call.lists[3], q, k, size)
        assert not (partly & wholly).any(), "a block is in both lists"
        seen = seen | wholly
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.float() @ keys.transpose(-1, -2)).mul(call.scale).masked_fill(~seen, -torch.inf)
    # A query that sees nothing gets zeros, and a log-sum-exp of -inf.
    out = (scores.softmax(-1).nan_to_num(nan=0.0) @ values).to(q.dtype)
    return (out, scores.logsumexp(-1)) if call.lse else out


def listed(counts: Tensor, blocks: Tensor, q: Tensor, k: Tensor, size: int) -> Tensor:
    """Pairs in listed blocks, each of them once: bool ``[batch, q_heads, nq, n]``."""
    places = torch.arange(blocks.shape[-1]) < counts[..., None]
    wide = torch.zeros(*blocks.shape[:-1], -(-k.shape[2] // size) + 1, dtype=torch.int64)
    spare = wide.shape[-1] - 1
    wide.scatter_add_(-1, blocks.long().where(places, spare), places.long())
    times = wide[..., :spare]
    assert times.max() <= 1, "a block is listed twice"
    pairs = times.bool().repeat_interleave(size, -1).repeat_interleave(size, -2)
    return pairs[..., : q.shape[2], : k.shape[2]].expand(*q.shape[:3], k.shape[2])
