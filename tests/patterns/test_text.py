"""Patterns are validated when built, and their text form reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sa_patch import SA, SWA, Full, MoBA
from sa_patch.errors import UserError
from sa_patch.patterns import PATTERNS, Pattern, make_pattern, parse_pattern

whole = st.integers(1, 10_000)
patterns = st.one_of(
    st.just(Full()),
    st.builds(SWA, whole),
    st.builds(
        SA, whole, seed=st.integers(-5, 2**40), circular=st.booleans(), per_head=st.booleans()
    ),
    st.builds(MoBA, whole, topk=whole),
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


def test_moba_window_means_topk_blocks() -> None:
    assert parse_pattern("moba:window=64") == MoBA(block_size=32, topk=2)
    assert make_pattern("moba", window=96, topk=3) == MoBA(block_size=32, topk=3)


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
        ("sa:8", "key=value"),
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


@pytest.mark.parametrize("value", [True, None, "8", 8.0])
def test_constructors_take_only_whole_numbers(value: object) -> None:
    for build in (SWA, SA, MoBA):
        with pytest.raises(UserError):
            build(value)  # type: ignore[arg-type]
