"""Block plans against the definitions of patterns, in plain torch.

Exhaustive over pairs: what a list leaves out, no kernel would ever see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.kernels.plans import chosen
from sa_patch.kernels.plans.block_lists import Blocks
from sa_patch.kernels.plans.chosen import chosen_starts
from sa_patch.kernels.plans.mask import mask_function
from sa_patch.kernels.plans.plan import Plan, plan_of, whole_pass
from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks, split_tail
from tests.laws.drawn import METHODS, patterns

LAYER, BATCH, HEADS = 2, 2, 4


def inputs(seq_len: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """2 rows, 4 query and 2 KV heads."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, seq_len, 3, generator=generator)
    return q, torch.randn(BATCH, HEADS // 2, seq_len, 3, generator=generator)


def visible_pairs(pattern: Pattern, q: Tensor, k: Tensor, order: Tensor) -> Tensor:
    """bool ``[batch, heads, n, n]`` by definition, for tokens in ``order [draws, n]``."""
    seq_len = q.shape[2]
    every = torch.arange(seq_len)
    rows = [
        pattern.visible(every, seq_len, layer=LAYER, heads=HEADS, q=queries, k=keys)
        for queries, keys in zip(q, k, strict=True)
    ]
    shown = torch.stack([row.expand(HEADS, -1, -1) for row in rows])
    head, order = torch.arange(HEADS)[:, None, None], order.expand(HEADS, -1)
    return shown[:, head, order[:, :, None], order[:, None]]


def by_blocks(pairs: Tensor, rows: int, block: int) -> Tensor:
    """Pairs ``[.., n, n]`` as ``[.., rows, rows, block * block]``, none beyond n."""
    fill = rows * block - pairs.shape[-1]
    square = torch.nn.functional.pad(pairs, (0, fill, 0, fill))
    return (
        square.unflatten(-1, (rows, block))
        .unflatten(-3, (rows, block))
        .transpose(-2, -3)
        .flatten(-2)
    )


def listed_blocks(counts: Tensor, blocks: Tensor) -> Tensor:
    """bool ``[.., rows, rows]``; every entry that counts stands there once."""
    rows = counts.shape[-1]
    assert counts.max() <= blocks.shape[-1], "a list is narrower than what it counts"
    counted = torch.arange(blocks.shape[-1]) < counts[..., None]
    times = torch.zeros(*counts.shape, rows, dtype=torch.int32)
    times.scatter_add_(-1, blocks.long(), counted.int())
    assert times.max() <= 1, "a block that is listed twice enters the softmax twice"
    return times > 0


def of_heads(listed: Tensor) -> Tensor:
    """Lists of KV heads, or of all heads, for every query head."""
    return listed.repeat_interleave(HEADS // listed.shape[1], dim=1)


@settings(max_examples=60)
@pytest.mark.parametrize("method", METHODS)
@given(
    data=st.data(),
    seq_len=st.integers(2, 90),
    block=st.sampled_from([1, 2, 4, 8, 16]),
    seed=st.integers(0, 2**20),
)
def test_mask_and_lists_are_those_of_the_definition(
    method: str, data: st.DataObject, seq_len: int, block: int, seed: int
) -> None:
    pattern, _ = split_tail(data.draw(patterns(method)))
    q, k = inputs(seq_len, seed)
    plan = plan_of(whole_pass(pattern), q, k, layer=LAYER, blocks=Blocks(block, block))
    visible = visible_pairs(pattern, q, k, plan.keys)
    assert torch.equal(plan.queries, plan.keys)
    assert torch.equal(plan.keys.gather(1, plan.places), torch.arange(seq_len).expand_as(plan.keys))
    assert torch.equal(masked_pairs(plan, seq_len), visible)
    some, whole = listed_blocks(*plan.lists[:2]), listed_blocks(*plan.lists[2:])
    assert not (some & whole).any(), "a block in both lists enters the softmax twice"
    rows = -(-seq_len // block)
    some, whole = (of_heads(x) for x in (some, whole))
    pairs = by_blocks(visible, rows, block)
    real = by_blocks(torch.ones_like(visible), rows, block)
    assert (pairs.any(-1) <= (some | whole)).all(), "a visible pair is not listed"
    assert ((pairs | ~real).all(-1) >= whole).all(), "a whole block hides a pair"
    if not plan.structure.rings:
        needless = (some | whole) & ~any_head(pairs.any(-1), plan.lists.counts.shape[1])
        assert not needless.any(), "a block is listed for nothing"


def any_head(seen: Tensor, lists: int) -> Tensor:
    """Whether one of the heads that share a list sees a block: like ``seen [.., heads, r, c]``."""
    of_list = seen.unflatten(1, (lists, -1))
    return of_list.any(2, keepdim=True).expand_as(of_list).flatten(1, 2)


def masked_pairs(plan: Plan, seq_len: int) -> Tensor:
    """What the mask shows: bool ``[batch, heads, n, n]``."""
    sizes = (BATCH, HEADS, seq_len, seq_len)
    places = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    return mask_function(plan.tables, plan.structure)(*places)


def mean_blocks(pattern: Pattern, seq_len: int) -> tuple[float, float]:
    """Key blocks of a block of queries, on average: those with a mask, and whole ones."""
    q, k = inputs(seq_len)
    plan = plan_of(whole_pass(pattern), q, k, layer=LAYER, blocks=Blocks(64, 64))
    return float(plan.lists[0].float().mean()), float(plan.lists[2].float().mean())


def test_lists_are_short() -> None:
    assert mean_blocks(Full(), 2048) == (1, 15.5)
    some, whole = mean_blocks(Sinks(4) | SWA(300), 2048)
    assert some <= 4 and whole <= 300 // 64
    for pattern in (SA(129), SA(129, circular=False), SA(129, per_head=True)):
        assert mean_blocks(pattern, 2048)[0] <= 1 + 2 * 128 // 64 + 1
    # On top of the width of a window, a block or two for each segment of keys.
    assert mean_blocks(PSA(129), 2048)[0] <= 10
    assert mean_blocks(PSA(33), 4096)[0] <= 10


@pytest.mark.parametrize("seq_len", [2, 64, 1000])
@pytest.mark.parametrize("pattern", [Full(), SWA(100), SA(9, per_head=True), MoBA(16, 3)], ids=str)
def test_both_lists_of_a_call_have_the_same_strides(pattern: Pattern, seq_len: int) -> None:
    """FlexAttention's GPU kernel reads the list of whole blocks by the strides of the other list.

    No CPU shows it: full attention was wrong on an H200 while the two lists had different widths.
    """
    blocks = Blocks(64, 64, least=2)
    lists = plan_of(whole_pass(pattern), *inputs(seq_len), layer=0, blocks=blocks).lists
    assert lists[1].stride() == lists[3].stride() and lists[1].is_contiguous()
    assert lists[0].stride() == lists[2].stride()
    assert lists[1].shape[-1] >= 2, "sizes of 1 are compiled in"


@pytest.mark.parametrize("pattern", [MoBA(7, 3), MoBA(40, 2)], ids=str)
def test_choosing_a_few_queries_at_a_time_changes_nothing(
    pattern: MoBA, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = inputs(100)
    at_once = chosen_starts(pattern, q, k)
    monkeypatch.setattr(chosen, "_SCORES_CPU", 1)
    assert torch.equal(chosen_starts(pattern, q, k), at_once)


def test_the_number_of_picks_follows_from_the_pattern_alone() -> None:
    """Otherwise every few tokens would be another mask to compile."""
    small: dict[str, Any] = {"block_size": 4, "sinks": 0, "local": 8}
    for pattern, picks in (
        (MoBA(5, 1), 0),
        (MoBA(5, 2), 1),
        (MoBA(10, 4), 4),
        (BlockTopK(topk=0, **small), 0),
        (MoBA(3, 6), 16),
        (BlockTopK(topk=16, **small), 16),
    ):
        starts = chosen_starts(pattern, *inputs(30))
        assert starts.shape[2] == picks
        assert (starts.diff(dim=2) >= 0).all()


@pytest.mark.parametrize(
    "pattern",
    [MoBA(3, 3), MoBA(11, 2), BlockTopK(4, 3, 2, 4, grouped=False), BlockTopK(4, 3, 2, 4)],
    ids=str,
)
def test_heads_that_share_a_tile_share_its_list(pattern: Pattern) -> None:
    """A list of a KV head holds what any of its query heads sees, and nothing for nothing."""
    q, k = inputs(61)
    blocks = Blocks(2, 4, heads=2)
    plan = plan_of(whole_pass(pattern), q, k, layer=LAYER, blocks=blocks)
    visible = visible_pairs(pattern, q, k, plan.keys).unflatten(1, (HEADS // 2, 2)).any(2)
    padded = torch.nn.functional.pad(visible, (0, 3, 0, 1))
    wanted = padded.unflatten(-1, (16, 4)).any(-1).unflatten(-2, (31, 2)).any(-2)
    found = torch.zeros(*plan.lists.counts.shape, 16, dtype=torch.bool)
    for counts, columns in (plan.lists[:2], plan.lists[2:]):
        places = torch.arange(columns.shape[-1]) < counts[..., None]
        times = torch.zeros(found.shape, dtype=torch.int32)
        found |= times.scatter_add_(-1, columns.long(), places.int()) > 0
    assert found.shape[1] == HEADS // 2 and torch.equal(found, wanted)
