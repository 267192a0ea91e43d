"""Patterns are validated when built, and their text form reads back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_patch import PSA, SA, SWA, BlockTopK, Full, MoBA, Sinks
from sa_patch.errors import UserError
from sa_patch.patterns import PATTERNS, Pattern, make_pattern, parse_pattern
from sa_patch.patterns.registry import is_text_form

whole = st.integers(1, 10_000)
patterns = st.one_of(
    st.just(Full()),
    st.builds(SWA, whole),
    st.builds(
        SA, whole, seed=st.integers(-5, 2**40), circular=st.booleans(), per_head=st.booleans()
    ),
    st.builds(MoBA, whole, topk=whole),
    st.builds(Sinks, whole),
    st.builds(PSA, whole, seed=st.integers(-5, 2**40), per_head=st.booleans()),
    st.builds(
        BlockTopK, whole, st.integers(0, 16), st.integers(0, 9), branch=st.sampled_from([0, 2, 8])
    ),
)


@given(patterns)
def test_text_form_reads_back(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern


def test_text_forms_are_stable() -> None:
    assert str(Full()) == "full"
    assert str(SWA(64)) == "swa:window=64"
    assert str(SA(128)) == "sa:window=128,seed=0"
    assert str(SA(8, seed=3, circular=False)) == "sa:window=8,seed=3,circular=false"
    assert str(MoBA(32)) == "moba:block_size=32,topk=2"
    assert str(Sinks()) == "sinks:size=4"
    assert str(PSA(64)) == "psa:window=64,seed=0"
    assert str(BlockTopK(16, 3)) == "block_topk:block_size=16,topk=3,sinks=4,local=32"
    union = "sinks:size=4+swa:window=60+sa:window=64,seed=0"
    assert str(SA(64) | SWA(60) | Sinks()) == union


def test_the_first_values_may_go_without_their_keys() -> None:
    assert parse_pattern("sa:64") == SA(64)
    assert parse_pattern("moba:16,8") == MoBA(16, 8)
    assert parse_pattern(" sinks:4 + sa:64, 3,per_head=true") == Sinks(4) | SA(64, 3, per_head=True)


def test_semicolons_stand_in_for_commas() -> None:
    assert parse_pattern("sa:window=64;seed=3+swa:9") == SWA(9) | SA(64, seed=3)


def test_moba_window_means_topk_blocks() -> None:
    assert parse_pattern("moba:window=64") == MoBA(block_size=32, topk=2)
    assert make_pattern("moba", window=96, topk=3) == MoBA(block_size=32, topk=3)


def test_a_named_form_takes_other_values_by_their_keys() -> None:
    shared = parse_pattern("shared_topk")
    assert make_pattern("shared_topk") == parse_pattern(str(shared)) == shared
    assert isinstance(shared, BlockTopK) and shared.shared > 1 and shared.percent > 0
    other = parse_pattern("sinks:4+shared_topk:percent=9;topk=2")
    assert other == Sinks(4) | replace(shared, percent=9, topk=2)
    with pytest.raises(UserError, match="'6' in 'shared_topk:6' is not of the form key=value"):
        parse_pattern("shared_topk:6")
    with pytest.raises(UserError, match="either window or"):
        parse_pattern("shared_topk:window=64")


def test_every_pattern_names_itself() -> None:
    for name, cls in PATTERNS.items():
        assert cls.name == name
        assert cls.summary


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("saa:window=8", "did you mean 'sa'"),
        ("sa:windw=8", "did you mean 'window'"),
        ("sa:window=0", "at least 1, got 0"),
        ("sa:window=-1", "at least 1, got -1"),
        ("sa:window=1.5", "got 1.5"),
        ("sa:window=x", "got 'x'"),
        ("sa:window=8,seed=1.5", "seed must be a whole number"),
        ("sa:window=8,circular=3", "circular must be true or false"),
        ("sa", "needs 'window'"),
        ("sa:x", "key=value"),
        ("swa:60,window=3", "given twice"),
        ("sa:seed=3,64", "key=value"),
        ("moba:16,8,4,true,5", "key=value"),
        ("sinks:4+", "is empty"),
        ("+swa:3", "is empty"),
        ("sinks:4+swa", "needs 'window'"),
        ("union:3", "unknown method 'union'"),
        ("block_topk:window=8", "no room for a chosen block"),
        ("block_topk:window=64,topk=3", "not both"),
        ("block_topk:block_size=4,local=6", "multiple of block_size=4"),
        ("block_topk:4,9,branch=2,beam=4", "at least topk=9"),
        ("block_topk:4,branch=1", "at least 2"),
        ("sa:window=8,window=9", "given twice"),
        ("full:window=8", "takes no parameters"),
        ("moba:block_size=8,topk=0", "topk must be a whole number of at least 1"),
        ("moba:window=7", "multiple of topk=2"),
        ("moba:window=8,block_size=4", "not both"),
        ("", "name:key=value"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says.replace("(", r"\(")) as error:
        parse_pattern(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["heads{2*full}", " heads{full} ", "full+swa:3", "shared_topk"])
def test_what_is_parsed_is_a_text_form(text: str) -> None:
    assert is_text_form(text) and parse_pattern(text)
    assert not is_text_form("sa") and not is_text_form("heads")


@pytest.mark.parametrize("name", [["sa"], {"sa": 1}, None, 3])
def test_names_are_text(name: object) -> None:
    with pytest.raises(UserError, match="unknown method"):
        make_pattern(name, window=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [True, None, "8", 8.0])
def test_constructors_take_only_whole_numbers(value: object) -> None:
    for build in (SWA, SA, MoBA, Sinks, PSA, BlockTopK):
        with pytest.raises(UserError):
            build(value)  # type: ignore[arg-type]
