"""Choices that a tile of queries shares, against sets that grow query by query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sa_patch.errors import UserError
from sa_patch.patterns import BlockTopK, Sinks
from sa_patch.patterns.block_selection.shared_choice import (
    chosen_so_far,
    expected_choices,
    tile_choices,
)


@given(
    shared=st.integers(1, 5),
    topk=st.integers(0, 3),
    queries=st.integers(1, 17),
    seed=st.integers(0, 2**20),
)
def test_queries_see_what_their_tile_chose_so_far(
    shared: int, topk: int, queries: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(-1, 6, (2, queries, topk), generator=generator)
    so_far = chosen_so_far(picks, shared)
    blocks, first_row, counts = tile_choices(picks, shared)
    assert so_far.shape == (2, queries, shared * topk)
    for chooser in range(2):
        for query in range(queries):
            begin = query // shared * shared
            expected = {int(b) for b in picks[chooser, begin : query + 1].flatten() if b >= 0}
            found = [int(b) for b in so_far[chooser, query] if b >= 0]
            assert sorted(found) == sorted(expected)
            tile = query // shared
            seen = first_row[chooser, tile] <= query - begin
            listed = blocks[chooser, tile][seen]
            assert {int(b) for b in listed if b >= 0} == expected
    # What there is stands in front.
    assert ((blocks[..., 1:] < 0) | (blocks[..., :-1] >= 0)).all()
    assert counts.equal((blocks >= 0).sum(-1, dtype=torch.int32))


def test_expected_choices_are_the_mean_of_random_ones() -> None:
    eligible, topk, shared, trials = 12, 3, 4, 4000
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(trials, shared, eligible, generator=generator)
    sizes = (chosen_so_far(scores.topk(topk).indices, shared) >= 0).sum(-1).double().mean(0)
    expected = expected_choices(
        torch.full((shared,), eligible), torch.full((shared,), topk), shared
    )
    assert (sizes - expected).abs().max() < 0.1
    assert expected_choices(torch.arange(6), torch.tensor(3), 1).tolist() == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"shared": 0}, "shared must be a whole number of at least 1, got 0"),
        ({"segment": 10, "sinks": 4, "local": 0}, "multiple of block_size=4 and shared=1, got 10"),
        ({"segment": 16, "shared": 32, "local": 0}, "multiple of block_size=4 and shared=32"),
        ({"segment": 16, "local": 4}, "with segment, local must be 0, got 4"),
        ({"segment": 16, "sinks": 3}, "sinks must be a multiple of block_size=4, got 3"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        BlockTopK(**parameters)


def test_what_is_seen_is_only_counted_where_it_is_chosen() -> None:
    pattern = BlockTopK(4, 2, 4, shared=8, segment=16)
    assert pattern.counts_need_content and not BlockTopK(4, 2).counts_need_content
    with pytest.raises(UserError, match="where its blocks are chosen"):
        pattern.count_visible(64)
    # More than a query's own choices, and never more than all.
    own = BlockTopK(4, 2, 4, segment=16).keys_per_query(256)
    seen = pattern.keys_per_query(256)
    assert (seen >= own).all() and (seen > own).any() and (seen <= torch.arange(1, 257)).all()


def test_a_union_shares_what_its_parts_share() -> None:
    assert (Sinks(4) | BlockTopK(4, 2, 4, shared=8)).shared_queries == 8
    assert Sinks(4).shared_queries == 1
