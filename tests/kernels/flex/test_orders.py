"""Orders and lists of backend `flex` that follow from points and choices, in plain torch.

Not compiled, and exhaustive over pairs: what a list leaves out, no kernel would ever see.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sa_patch.kernels.flex import chosen_blocks as flex_chosen
from sa_patch.kernels.flex.chosen_blocks import chosen_starts, content_blocks, first_near
from sa_patch.kernels.flex.points import order_by_points, segments
from sa_patch.patterns import PSA, BlockTopK, MoBA
from sa_patch.patterns.ring import Ring
from tests.kernels.flex.test_blocks import by_blocks, listed_blocks

BLOCKS = st.sampled_from([1, 2, 4, 8, 16])


def check_order(ring: Ring, block: int) -> float:
    """Every visible pair stands in one listed block; returns the blocks of a row, on average."""
    queries, keys, lists = order_by_points(ring, block)
    n, draws = ring.seq_len, len(ring.points)
    visible = ring.visible(torch.arange(n))
    counts = lists.counts.view(draws, -1)
    blocks = lists.blocks.view(draws, counts.shape[1], -1)
    for draw in range(draws):
        assert torch.equal(queries[draw].sort().values, torch.arange(n))
        for row in range(counts.shape[1]):
            columns = blocks[draw, row, : counts[draw, row]].tolist()
            assert max(columns) < lists.columns
            places = [keys[draw, block * c : block * (c + 1)] for c in columns]
            seen = torch.cat(places)
            assert len(seen.unique()) == len(seen), "a key is listed twice"
            here = queries[draw, block * row : block * (row + 1)]
            wanted = visible[draw, here].any(0).nonzero()[:, 0]
            assert torch.isin(wanted, seen).all(), "a visible key is not listed"
    return float(counts.float().mean())


@settings(max_examples=120, deadline=None)
@given(
    seq_len=st.integers(1, 90),
    window=st.integers(1, 40),
    block=BLOCKS,
    seed=st.integers(0, 2**20),
    heads=st.sampled_from([None, 3]),
)
def test_points_list_every_visible_pair_once(
    seq_len: int, window: int, block: int, seed: int, heads: int | None
) -> None:
    pattern = PSA(window, seed, per_head=heads is not None)
    check_order(pattern.ring(seq_len, 2, heads or 1), block)


@settings(max_examples=60, deadline=None)
@given(seq_len=st.integers(1, 60), block=BLOCKS, seed=st.integers(0, 2**20))
def test_equal_points_and_any_reach_are_listed_too(seq_len: int, block: int, seed: int) -> None:
    """Points of a small ring coincide, and reaches go around it."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 12, (1, seq_len), generator=generator)
    reach = torch.randint(0, 7, (seq_len,), generator=generator)
    check_order(Ring(points, reach, 12), block)


@pytest.mark.parametrize("window", [33, 129])
def test_rows_list_few_times_the_window(window: int) -> None:
    """128 keys lie between the points of 64 queries, and up to 2 w in reach to the sides."""
    listed = check_order(PSA(window).ring(2048), 64)
    assert listed <= (128 + 2 * window) / 64 + 1.5


def test_a_key_stands_in_at_most_three_segments_on_average() -> None:
    for n in (1, 64, 65, 128, 1000, 4096, 4097):
        parts = segments(n, 64)
        assert [first for first, _ in parts] == [0, *(last for _, last in parts[:-1])]
        assert parts[-1][1] == n
        assert sum(last for _, last in parts) <= 3 * n


@st.composite
def content_patterns(draw: st.DrawFn) -> MoBA | BlockTopK:
    size, topk = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        return MoBA(size, topk)
    return BlockTopK(
        block_size=size,
        topk=topk - 1,
        sinks=draw(st.integers(0, 6)),
        local=size * draw(st.integers(0, 2)),
        branch=draw(st.sampled_from([0, 2])),
        beam=4,
        grouped=draw(st.booleans()),
    )


def random_q_and_k(seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
    """2 rows, 4 query and 2 KV heads."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, seq_len, 3, generator=generator)
    return q, torch.randn(2, 2, seq_len, 3, generator=generator)


@settings(max_examples=150, deadline=None)
@given(
    seq_len=st.integers(2, 70),
    pattern=content_patterns(),
    window=st.integers(0, 20),
    block=BLOCKS,
    seed=st.integers(0, 2**20),
)
def test_chosen_lists_are_exactly_the_blocks_with_a_visible_pair(
    seq_len: int, pattern: MoBA | BlockTopK, window: int, block: int, seed: int
) -> None:
    q, k = random_q_and_k(seq_len, seed)
    positions, keys = torch.arange(seq_len), torch.arange(seq_len)
    near = first_near(pattern, positions)
    starts = chosen_starts(pattern, q, k)
    picks = starts.shape[2]
    assert starts.shape == (2, 4, picks, seq_len) and picks & (picks - 1) == 0
    assert (starts.diff(dim=2) >= 0).all()
    sinks = pattern.sinks if isinstance(pattern, BlockTopK) else 0
    seen_from = torch.minimum(near, positions - window + 1).clamp(min=0)
    choices = [(starts, pattern.block_size)] if picks else []
    lists = content_blocks(seen_from, sinks, choices, block)
    counts = lists.counts.expand(2, 4, -1)
    blocks = lists.blocks.expand(2, 4, -1, -1)
    banded = (keys <= positions[:, None]) & (positions[:, None] - keys < window)
    for row in range(2):
        visible = pattern.visible(positions, seq_len, heads=4, q=q[row], k=k[row])
        visible = visible.expand(4, -1, -1)
        for head in range(4):
            step = keys[None, :, None] - starts[row, head].T[:, None]
            inside = ((step >= 0) & (step < pattern.block_size)).any(-1)
            unchosen = (keys < sinks) | (keys >= near[:, None])
            shown = (inside | unchosen) & (keys <= positions[:, None])
            assert torch.equal(shown, visible[head])
            wanted = by_blocks(shown | banded, block).flatten(2).any(-1)
            found = listed_blocks(counts[row, head], blocks[row, head], len(wanted))
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("pattern", [MoBA(7, 3), MoBA(40, 2)], ids=str)
def test_choosing_in_pieces_changes_nothing(pattern: MoBA, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = random_q_and_k(100, 1)
    whole = chosen_starts(pattern, q, k)
    monkeypatch.setitem(flex_chosen._SCORE_ELEMENTS, "cpu", 1)
    assert torch.equal(chosen_starts(pattern, q, k), whole)


def test_the_number_of_picks_follows_from_the_pattern_alone() -> None:
    """Otherwise every few tokens would be another family to compile."""
    q, k = random_q_and_k(30, 1)
    for pattern, picks in (
        (MoBA(5, 1), 0),
        (MoBA(5, 2), 1),
        (MoBA(10, 4), 4),
        (BlockTopK(block_size=4, topk=0, sinks=0, local=8), 0),
        (BlockTopK(block_size=4, topk=6, sinks=0, local=8), 8),
    ):
        assert chosen_starts(pattern, q, k).shape[2] == picks
