"""Unions: normal form, budget, text, seeds, and the budget splitter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sa_patch import PSA, SA, SWA, BlockTopK, Full, MoBA, Sinks
from sa_patch.errors import UserError
from sa_patch.patterns import (
    ByHead,
    Pattern,
    Power,
    Union,
    parse_pattern,
    parts_of,
    seed_of,
    split_budget,
    unite,
    with_seed,
)
from tests.laws.drawn import patterns

P_VALUE = 1e-4


@given(data=st.data(), n=st.integers(1, 40))
def test_a_union_shows_what_any_of_its_parts_shows(data: st.DataObject, n: int) -> None:
    names = st.sampled_from(["sinks", "swa", "tail", "sa", "psa", "moba", "block_topk"])
    parts = [data.draw(patterns(data.draw(names))) for _ in range(data.draw(st.integers(1, 4)))]
    generator = torch.Generator().manual_seed(n)
    q, k = (torch.randn(heads, n, 4, generator=generator) for heads in (4, 2))
    arguments: dict[str, Any] = {"layer": 2, "heads": 4, "q": q, "k": k}
    seen = torch.zeros(4, n, n, dtype=torch.bool)
    for part in parts:
        seen |= part.visible(torch.arange(n), n, **arguments)
    united = unite(*parts).visible(torch.arange(n), n, **arguments)
    assert torch.equal(united.expand_as(seen), seen)


@given(data=st.data(), n=st.integers(1, 50))
def test_the_rule_of_single_pairs_is_the_mask(data: st.DataObject, n: int) -> None:
    pattern = data.draw(
        patterns(data.draw(st.sampled_from(["sinks", "swa", "tail", "sa", "psa", "union"])))
    )
    if pattern.reads_content:
        with pytest.raises(TypeError, match="content"):
            pattern.rule(n)
        return
    i = torch.arange(n)
    near = pattern.rule(n, layer=1, heads=3)(i[None, :, None], i[None, None])
    mask = pattern.visible(i, n, layer=1, heads=3)
    assert torch.equal((near & (i <= i[:, None])).expand(3, n, n), mask.expand(3, n, n))


@dataclass(frozen=True)
class Even(Pattern):
    """Query i sees keys an even number back: with what every pattern must have, and no more."""

    step: int = 2

    name = "even"
    summary = "keys an even number back"

    def visible(self, query_positions: torch.Tensor, seq_len: int, **_: object) -> torch.Tensor:
        behind = query_positions[:, None] - torch.arange(seq_len)
        return ((behind >= 0) & (behind % self.step == 0))[None]

    def keys_per_query(self, seq_len: int) -> torch.Tensor:
        return torch.arange(seq_len).double() // self.step + 1

    def saturated(self, seq_len: int) -> bool:
        return seq_len <= 1

    @property
    def effective_window(self) -> None:
        return None


@pytest.mark.parametrize("others", [(Sinks(3), SWA(4)), (SA(3, per_head=True),), (Even(3),)])
def test_parts_without_a_rule_are_counted(others: tuple[Pattern, ...]) -> None:
    union = unite(Even(), *others)
    seen = union.visible(torch.arange(40), 40, heads=2).sum(-1)
    assert torch.equal(union.count_visible(40, heads=2), seen)


def test_a_pattern_without_a_rule_says_so() -> None:
    with pytest.raises(TypeError, match="even has no rule of single pairs"):
        (Even() | Sinks(2)).rule(9)


def test_equal_unions_are_equal_objects() -> None:
    one = Sinks(4) | SWA(60) | SA(64)
    assert one == SA(64) | (SWA(60) | Sinks(2)) | Sinks(4) | SWA(3) | SA(64)
    assert hash(one) == hash(parse_pattern("sa:64+swa:60+sinks:4"))
    assert isinstance(one, Union) and one.parts == (Sinks(4), SWA(60), SA(64))
    assert SWA(3) | SWA(5) == SWA(5)
    assert Full() | one == Full()
    assert isinstance(SA(8) | SA(8, seed=1), Union)


@pytest.mark.parametrize("kind", [SA, PSA])
@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"seed": 7}])
def test_of_parts_of_one_draw_the_widest_stays(kind: type[SA | PSA], options: dict) -> None:
    narrow, wide = kind(3, **options), kind(9, **options)
    assert Sinks(1) | narrow | wide == Sinks(1) | wide
    assert narrow | wide == wide | narrow == wide
    seen = [part.visible(torch.arange(60), 60, layer=1, heads=2) for part in (narrow, wide)]
    assert not (seen[0] & ~seen[1]).any() and (seen[1] & ~seen[0]).any()


def test_a_line_lies_within_the_ring_of_its_draw() -> None:
    line, ring = SA(6, circular=False), SA(6)
    assert line | ring == ring | line == ring and isinstance(SA(7, circular=False) | ring, Union)
    seen = [part.visible(torch.arange(60), 60) for part in (line, ring)]
    assert not (seen[0] & ~seen[1]).any() and (seen[1] & ~seen[0]).any()
    for other in (SA(9, seed=1), SA(9, per_head=True), PSA(9)):
        assert isinstance(line | other, Union)


def test_a_union_is_no_union_with_something_else() -> None:
    with pytest.raises(TypeError):
        SWA(3) | 4  # type: ignore[operator]


@pytest.mark.parametrize(
    "parts",
    [
        *((), (SWA(3),), (SWA(3), Sinks(2)), (SWA(3), SWA(4)), (Full(), SWA(3)), [SWA(3), SA(2)]),
        *((SA(3), SA(4)), (SA(3, circular=False), SA(4))),
    ],
)
def test_only_the_normal_form_can_be_built(parts: tuple[Pattern, ...]) -> None:
    with pytest.raises(UserError, match="make a union with"):
        Union(parts)


@pytest.mark.parametrize(
    "pattern",
    [
        Sinks(2) | SWA(5),
        Sinks(2) | SWA(5) | SA(6),
        SWA(1) | PSA(6),
        Sinks(3) | SA(3) | SA(4, seed=1000) | PSA(5),
    ],
    ids=str,
)
def test_mean_counts_are_the_closed_form(pattern: Pattern) -> None:
    n, draws = 40, 1000
    seeds = range(draws) if seed_of(pattern) is not None else range(2)

    def drawn(seed: int) -> Pattern:
        if seed_of(pattern) is None:
            return pattern
        # Parts of one kind must not come to share a seed, and so their points.
        parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
        return unite(
            *(
                with_seed(part, seed + 10_000 * place) if seed_of(part) is not None else part
                for place, part in enumerate(parts)
            )
        )

    counts = np.stack([drawn(seed).count_visible(n, layer=1)[0].numpy() for seed in seeds])
    error = counts.std(axis=0) / math.sqrt(draws)
    limit = stats.norm.isf(P_VALUE / n)
    expected = pattern.keys_per_query(n).numpy()
    assert (np.abs(counts.mean(axis=0) - expected) <= limit * error + 1e-4).all()


def test_counts_of_a_choice_beside_others_are_left_to_measurement() -> None:
    pattern = Sinks(4) | MoBA(16, 8)
    assert pattern.counts_need_content and not (Sinks(4) | SA(8)).counts_need_content
    assert not MoBA(16, 8).counts_need_content
    with pytest.raises(UserError, match="counted where its blocks are chosen"):
        pattern.count_visible(100)
    counts = pattern.keys_per_query(300)
    assert (counts <= torch.arange(1, 301)).all() and (counts >= 1).all()


def test_what_is_known_of_a_union() -> None:
    pattern = Sinks(4) | SWA(60) | SA(64)
    assert pattern.effective_window == 128
    assert not pattern.prefix_stable and (Sinks(4) | PSA(8)).prefix_stable
    assert (Sinks(4) | SWA(60)).bounded_reach == (4, 60)
    assert pattern.bounded_reach is None and MoBA(4).bounded_reach is None
    assert (Sinks(4) | SWA(60)).saturated(64) and not (Sinks(4) | SWA(60)).saturated(65)
    choosing = Sinks(4) | MoBA(16, 3) | BlockTopK(4, 8)
    assert isinstance(choosing, Union)
    parts = [part.selection_dots(500) for part in choosing.parts]
    assert torch.equal(choosing.selection_dots(500), torch.stack(parts).sum(0))


def test_seeds_are_set_in_every_random_part() -> None:
    assert with_seed(SA(8, seed=2), 5) == SA(8, seed=5)
    assert with_seed(SA(8) | SA(8, seed=1), 5) == SA(8, seed=5) | SA(8, seed=5 + 2**32)
    alike = SA(8) | SA(9, circular=False) | SA(8, seed=1)
    assert with_seed(alike, 5) == SA(8, 5) | SA(9, 5, circular=False) | SA(8, 5 + 2**32)
    pattern = with_seed(Sinks(4) | SA(8) | PSA(9, seed=3), 7)
    assert pattern == Sinks(4) | SA(8, 7) | PSA(9, 10)
    assert seed_of(pattern) == 7 and seed_of(Sinks(4) | SWA(3)) is None
    with pytest.raises(UserError, match="takes no seed"):
        with_seed(Sinks(4) | SWA(3), 1)


def test_random_parts_stand_in_the_order_of_their_numbers() -> None:
    union = SA(8, seed=10) | SA(32, seed=9) | SA(4, seed=-1)
    assert [part.seed for part in parts_of(union)] == [-1, 9, 10]  # type: ignore[attr-defined]
    assert seed_of(union) == -1 and seed_of(with_seed(SA(32) | SA(32, seed=1), 9)) == 9


def of_kinds(pattern: Pattern) -> set[tuple[type[Pattern], int]]:
    """What random parts draw with, of all heads."""
    heads = pattern.patterns if isinstance(pattern, ByHead) else (pattern,)
    parts = [part for own in heads for part in parts_of(own)]
    return {(type(part), part.seed) for part in parts if isinstance(part, (SA, PSA))}


random_parts = st.one_of(
    st.builds(SA, st.integers(1, 9), st.integers(-2, 3), circular=st.booleans()),
    st.builds(PSA, st.integers(1, 9), st.integers(-2, 3)),
)
random_unions = st.lists(random_parts, min_size=1, max_size=4).map(lambda parts: unite(*parts))
several_heads = st.lists(random_unions, min_size=1, max_size=3).map(lambda own: ByHead((*own,)))


@given(pattern=st.one_of(random_unions, several_heads), seeds=st.tuples(*[st.integers(0, 40)] * 2))
def test_draws_of_different_seeds_share_nothing(pattern: Pattern, seeds: tuple[int, int]) -> None:
    one, other = (with_seed(pattern, seed) for seed in seeds)
    assert (seed_of(one), seed_of(other)) == seeds
    assert len(of_kinds(one)) == len(of_kinds(pattern))
    assert seeds[0] == seeds[1] or not of_kinds(one) & of_kinds(other)
    assert with_seed(one, seeds[1]) == other and with_seed(one, seeds[0]) == one
    if len(of_kinds(pattern)) == len({kind for kind, _ in of_kinds(pattern)}):
        assert with_seed(pattern, seed_of(pattern) or 0) == pattern


def test_seeds_apart_by_a_word_draw_different_permutations() -> None:
    draws = [SA(8, seed).slots(200, 0, 1)[0].tolist() for seed in (5, 5 + 2**32, 5 + 2**33)]
    points = [PSA(8, seed).points(200, range(1), 1).tolist() for seed in (5, 5 + 2**32)]
    assert draws[0] != draws[1] != draws[2] != draws[0] and points[0] != points[1]


@given(data=st.data())
def test_text_forms_of_unions_read_back(data: st.DataObject) -> None:
    pattern = data.draw(patterns("union"))
    assert parse_pattern(str(pattern)) == pattern


def test_a_budget_is_split() -> None:
    assert split_budget(128) == Sinks(4) | SWA(62) | SA(62)
    assert split_budget(128, sinks=8, local=0.25, rest="psa", seed=3) == (
        Sinks(8) | SWA(30) | PSA(90, seed=3)
    )
    assert split_budget(64, local=1.0) == Sinks(4) | SWA(60)
    assert split_budget(64, sinks=0, local=0) == SA(64)
    assert (
        split_budget(64, rest="swa") == split_budget(64, local=0, rest="swa") == Sinks(4) | SWA(60)
    )
    assert split_budget(64, local=0.25, rest="power") == Sinks(4) | Power(60)
    for total in range(5, 200):
        assert split_budget(total, local=0.3).effective_window == total


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"total": 4}, "leave nothing of total=4"),
        ({"total": 64, "local": 1.5}, "from 0 to 1"),
        ({"total": 64, "local": True}, "from 0 to 1"),
        ({"total": 64, "rest": "sax"}, "did you mean 'sa'"),
        ({"total": 64, "rest": "moba", "seed": 1}, "no parameter 'seed'"),
        ({"total": 0}, "at least 1"),
    ],
)
def test_budgets_that_cannot_be_split_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        split_budget(**arguments)
