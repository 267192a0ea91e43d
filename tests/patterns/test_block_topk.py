"""Block choice: the definition against a loop in whole numbers, its cost, and what it refuses.

Small whole numbers tie often, and their means over powers of two and their products are exact in
fp32: so every visible set here is compared exactly, ties included.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patterns import BlockTopK
from sa_patch.patterns.block_selection import tree as block_tree


def blocks_and_dots(pattern: BlockTopK, query: np.ndarray, keys: np.ndarray, i: int) -> tuple:
    """The blocks that query i chooses and the dot products it spends, by plain loops."""
    size, branch, first = pattern.block_size, pattern.branch, pattern.sinks
    count = max(0, (i - first) // size - pattern.local // size)

    def known(level: int) -> int:
        return count // branch**level if level else count

    def score(level: int, node: int) -> float:
        tokens = size * branch**level if level else size
        return float(query @ keys[first + node * tokens : first + (node + 1) * tokens].mean(0))

    level = 0
    while branch and known(level) > pattern.beam:
        level += 1
    found = list(range(known(level)))
    dots = 0
    while True:
        limit = pattern.beam if level else max(pattern.topk, count * pattern.percent // 100)
        if limit and len(found) > limit:
            dots += len(found)
            found.sort(key=lambda node: (-score(level, node), node))
        found = found[:limit]
        if not level or not pattern.topk:
            return set(found) if pattern.topk else set(), dots if pattern.topk else 0
        level -= 1
        orphans = range(known(level + 1) * branch, known(level))
        found = [node * branch + step for node in found for step in range(branch)] + [*orphans]
        found.sort()


def expected_keys(pattern: BlockTopK, i: int, blocks: set[int]) -> list[int]:
    first, size = pattern.sinks, pattern.block_size
    near = first + max(0, (i - first) // size * size - pattern.local)
    chosen = {first + block * size + offset for block in blocks for offset in range(size)}
    return [j for j in range(i + 1) if j < first or j >= near or j in chosen]


@st.composite
def exact_patterns(draw: st.DrawFn) -> BlockTopK:
    """Patterns whose means are exact: all sizes are powers of two."""
    size = draw(st.sampled_from([1, 2, 4]))
    branch, beam = draw(st.sampled_from([0, 2, 4])), draw(st.integers(1, 5))
    topk = draw(st.integers(0, beam * branch if branch else 6))
    return BlockTopK(
        block_size=size,
        topk=topk,
        sinks=draw(st.integers(0, 5)),
        local=size * draw(st.integers(0, 2)),
        branch=branch,
        beam=beam,
        grouped=draw(st.booleans()),
        percent=draw(st.sampled_from([0, 25, 60])) if topk and not branch else 0,
    )


def whole_numbers(n: int, seed: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-2, 3, (heads, n, 3), generator=generator).float()
    return q, torch.randint(-2, 3, (kv_heads, n, 3), generator=generator).float()


def chosen_sets(pattern: BlockTopK, q: Tensor, k: Tensor, positions: Tensor) -> list:
    """Of every chooser and query the set of blocks, each once."""
    picks = pattern.picks(q, k, positions)
    rows = [[[int(b) for b in row if b >= 0] for row in head] for head in picks]
    assert all(len(row) == len(set(row)) for head in rows for row in head)
    return [[set(row) for row in head] for head in rows]


seeds = st.integers(0, 2**20)


@given(pattern=exact_patterns(), n=st.integers(1, 70), seed=seeds)
def test_choice_keys_and_dots_are_those_of_a_loop(pattern: BlockTopK, n: int, seed: int) -> None:
    q, k = whole_numbers(n, seed)
    visible = pattern.visible(torch.arange(n), n, heads=4, q=q, k=k)
    counts = pattern.count_visible(n)[0]
    dots = pattern.selection_dots(n, group=2)
    for head in range(4):
        kv_head = head // 2
        queries = q[2 * kv_head : 2 * kv_head + 2].sum(0) if pattern.grouped else q[head]
        for i in range(n):
            blocks, spent = blocks_and_dots(pattern, queries[i].numpy(), k[kv_head].numpy(), i)
            expected = expected_keys(pattern, i, blocks)
            assert visible[head, i].nonzero().flatten().tolist() == expected, (head, i)
            assert counts[i] == len(expected)
            assert dots[i] == (spent / 2 if pattern.grouped else spent)


@given(pattern=exact_patterns(), n=st.integers(1, 60), more=st.integers(0, 60), seed=seeds)
def test_what_follows_changes_no_choice(pattern: BlockTopK, n: int, more: int, seed: int) -> None:
    q, k = whole_numbers(n + more, seed)
    whole = chosen_sets(pattern, q, k, torch.arange(n + more))
    alone = chosen_sets(pattern, q[:, :n], k[:, :n], torch.arange(n))
    assert alone == [head[:n] for head in whole]
    later = torch.arange(n, n + more)
    assert chosen_sets(pattern, q[:, n:], k, later) == [head[n:] for head in whole]


@given(pattern=exact_patterns(), n=st.integers(1, 80), seed=seeds)
def test_a_beam_that_holds_every_node_is_a_flat_choice(
    pattern: BlockTopK, n: int, seed: int
) -> None:
    q, k = whole_numbers(n, seed)
    positions = torch.arange(n)
    pattern = replace(pattern, percent=0)
    flat = chosen_sets(replace(pattern, branch=0), q, k, positions)
    for branch in (2, 4):
        wide = replace(pattern, branch=branch, beam=n + 10)
        assert chosen_sets(wide, q, k, positions) == flat


def test_a_narrow_beam_is_not_a_flat_choice() -> None:
    q, k = whole_numbers(200, seed=0)
    narrow = BlockTopK(2, topk=2, sinks=0, local=0, branch=2, beam=1)
    positions = torch.arange(200)
    flat = chosen_sets(replace(narrow, branch=0), q, k, positions)
    assert chosen_sets(narrow, q, k, positions) != flat


@pytest.mark.parametrize("gain", [0, 10**9])
@pytest.mark.parametrize("held", [1, 10**9])
@given(pattern=exact_patterns(), seed=seeds)
def test_ways_to_score_and_pieces_do_not_show(
    gain: int, held: int, pattern: BlockTopK, seed: int
) -> None:
    q, k = whole_numbers(90, seed)
    expected = chosen_sets(pattern, q, k, torch.arange(90))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_tree, "_PRODUCT_GAIN_CPU", gain)
        patch.setattr(block_tree, "_HELD_CPU", held)
        assert chosen_sets(pattern, q, k, torch.arange(90)) == expected


@given(pattern=exact_patterns(), seed=seeds)
def test_any_order_of_queries_will_do(pattern: BlockTopK, seed: int) -> None:
    q, k = whole_numbers(60, seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    expected = chosen_sets(pattern, q, k, torch.arange(60))
    mixed = chosen_sets(pattern, q[:, order], k, order)
    assert mixed == [[head[i] for i in order] for head in expected]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("gain", [0, 8])
@given(pattern=exact_patterns(), seed=seeds)
def test_what_is_no_number_costs_no_block(
    poison: float, gain: int, pattern: BlockTopK, seed: int
) -> None:
    """Scores that are no numbers, or overflow, leave as many blocks chosen as ever."""
    q, k = whole_numbers(70, seed)
    q[:, ::3] *= poison
    k[:, seed % 70] = poison
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_tree, "_PRODUCT_GAIN_CPU", gain)
        visible = pattern.visible(torch.arange(70), 70, heads=4, q=q, k=k)
    assert torch.equal(visible.sum(-1), pattern.count_visible(70).expand(4, -1))
    assert not visible.triu(1).any()


def test_a_block_that_is_no_number_is_chosen_last() -> None:
    q, k = torch.ones(1, 40, 1), torch.ones(1, 40, 1)
    k[0, 8:12] = torch.nan
    k[0, 20:24] = -5
    pattern = BlockTopK(4, topk=8, sinks=0, local=0, branch=0)
    assert chosen_sets(pattern, q, k, torch.tensor([39]))[0][0] == {0, 1, 3, 4, 5, 6, 7, 8}


def test_equal_blocks_are_taken_from_the_front_on_every_level() -> None:
    q, k = torch.ones(2, 300, 2), torch.ones(1, 300, 2)
    positions = torch.arange(300)
    for branch in (0, 2, 8):
        pattern = BlockTopK(2, topk=3, sinks=1, local=2, branch=branch, beam=4)
        for head in chosen_sets(pattern, q, k, positions):
            eligible = pattern.eligible(positions).tolist()
            assert head == [set(range(min(3, count))) for count in eligible]


def test_one_choice_for_a_group_is_that_of_the_sum_of_its_queries() -> None:
    q, k = whole_numbers(80, seed=5, heads=6)
    each = BlockTopK(2, topk=3, sinks=2, local=2, branch=4, beam=2, grouped=False)
    shared = replace(each, grouped=True)
    sums = q.unflatten(0, (2, 3)).sum(1)
    positions = torch.arange(80)
    assert chosen_sets(shared, q, k, positions) == chosen_sets(each, sums, k, positions)
    visible = shared.visible(positions, 80, heads=6, q=q, k=k)
    assert torch.equal(visible[0], visible[2]) and torch.equal(visible[3], visible[5])
    assert not torch.equal(visible[0], visible[3])


def test_dots_grow_with_the_logarithm_of_the_length() -> None:
    pattern = BlockTopK(4, topk=8, branch=8, beam=8, grouped=False)
    last = [float(pattern.selection_dots(n)[-1]) for n in (4096, 32768, 262144)]
    assert last[0] < last[1] < last[2]
    # Every level has at most beam * branch children, and branch - 1 nodes without a parent.
    assert last[2] - last[1] <= 8 * 8 + 7
    assert float(replace(pattern, branch=0).selection_dots(32768)[-1]) > 8000 > 20 * last[1]


def test_no_gradient_is_recorded() -> None:
    q, k = whole_numbers(50, seed=1)
    picks = BlockTopK(2, topk=2, branch=2, beam=2).picks(q.requires_grad_(), k, torch.arange(50))
    assert not picks.requires_grad and picks.dtype == torch.int64


@pytest.mark.parametrize(
    "parameters, named",
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 2.0}, "block_size"),
        ({"topk": -1}, "topk"),
        ({"topk": True}, "topk"),
        ({"sinks": -1}, "sinks"),
        ({"local": 6}, "multiple of block_size=4"),
        ({"branch": 1}, "branch must be at least 2"),
        ({"beam": 0}, "beam"),
        ({"topk": 9, "beam": 2, "branch": 4}, r"beam \* branch must be at least topk=9"),
        ({"grouped": 1}, "grouped"),
        ({"percent": 100, "branch": 0}, "percent must be at most 99.* got percent=100"),
        ({"percent": 6}, "only with branch=0 .* got percent=6, branch=4"),
        ({"percent": 6, "branch": 0, "topk": 0}, "topk of at least 1, .* topk=0"),
        ({"threshold": -0.5, "branch": 0}, "threshold must be a number of at least 0, got -0.5"),
        ({"threshold": math.nan, "branch": 0}, "threshold must be a number of at least 0, got nan"),
        ({"threshold": math.inf, "branch": 0}, "threshold must be a number of at least 0, got inf"),
        ({"threshold": True, "branch": 0}, "threshold must be a number of at least 0, got True"),
        ({"threshold": 0.1}, "threshold may be above 0 only with branch=0.* got branch=4"),
        ({"threshold": 0.1, "branch": 0, "percent": 5}, "percent=0 .* percent=5"),
        ({"threshold": 0.1, "branch": 0, "topk": 0}, "topk of at least 1, got .* topk=0"),
    ],
)
def test_bad_parameters_are_named(parameters: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        BlockTopK(**parameters)
    assert BlockTopK(topk=8, beam=2, branch=4).topk == 8


@given(
    window=st.integers(8, 600),
    block_size=st.integers(1, 40),
    sinks=st.integers(0, 9),
    branch=st.sampled_from([0, 2, 8]),
)
def test_a_window_is_never_exceeded_and_nearly_used(
    window: int, block_size: int, sinks: int, branch: int
) -> None:
    try:
        pattern = BlockTopK.from_window(window, block_size, sinks, branch)
    except UserError as error:
        assert "no room for a chosen block" in str(error)
        assert window < sinks + 2 * block_size + window // 4
        return
    most = int(pattern.count_visible(3 * window + 200).max())
    assert window - block_size < most <= window
    assert pattern.effective_window == most


@pytest.mark.parametrize(
    "arguments",
    [{"window": 0}, {"window": 11}, {"window": 64, "branch": "8"}, {"window": 64, "sinks": -1}],
)
def test_windows_that_cannot_be_had_are_refused(arguments: dict) -> None:
    with pytest.raises(UserError, match=r"window|branch|sinks"):
        BlockTopK.from_window(**arguments)
