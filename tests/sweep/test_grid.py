"""Entries of a sweep file that stand for many patterns: unions, shared keys, equal FLOPs."""

from typing import Any

import pytest
import yaml

from sa_patch.cli.help_texts import SWEEP_EXAMPLES
from sa_patch.errors import UserError
from sa_patch.kernels.visited_keys import visited_share
from sa_patch.patching import Schedule
from sa_patch.patterns import (
    PSA,
    SA,
    SWA,
    MoBA,
    Pattern,
    Sinks,
    fit_budget,
    flops_share,
    seed_of,
    with_seed,
)
from sa_patch.sweep.config import parse_config

LOCAL, MIXED = "sinks:4+swa:{}", "sinks:4+swa:12+psa:{}"
ENTRY: dict[str, Any] = {
    "method": "budget",
    "families": [LOCAL, MIXED],
    "n": [256, 512],
    "shares": ["1/4", 0.5],
    "seeds": [0, 7],
}


def patterns(**changes: Any) -> tuple[Pattern, ...]:
    entry = {key: value for key, value in {**ENTRY, **changes}.items() if value is not None}
    return parse_config({"methods": [entry], "tasks": ["needle_128"]}).patterns


def test_unions_take_seeds_in_every_random_part() -> None:
    methods = [{"method": "sinks:4+swa:6+sa:8+psa:9", "seeds": [1, 2]}, "sinks:4+swa:6"]
    config = parse_config({"methods": methods, "tasks": ["needle_128"]})
    assert config.patterns == (
        *(Sinks(4) | SWA(6) | SA(8, seed=s) | PSA(9, seed=s) for s in (1, 2)),
        Sinks(4) | SWA(6),
    )


def test_a_budget_is_split_for_every_total_and_seed() -> None:
    split = {"method": "split", "total": [24, 44], "sinks": 4, "local": 0.5, "rest": "psa"}
    config = parse_config({"methods": [{**split, "seeds": [0, 1]}], "tasks": ["needle_128"]})
    assert set(config.patterns) == {
        Sinks(4) | SWA(near) | PSA(near, seed=seed) for near in (10, 20) for seed in (0, 1)
    }
    bare = parse_config(
        {"methods": [{"method": "split", "total": 20, "rest": "moba"}], "tasks": ["needle_128"]}
    )
    assert bare.patterns == (Sinks(4) | SWA(8) | MoBA.from_window(8),)


def test_every_family_is_fitted_to_every_share_and_length() -> None:
    found = patterns()
    fitted = [(n, share) for n in (256, 512) for share in (1 / 4, 1 / 2)]
    assert set(found) == {
        *(fit_budget(LOCAL, n, share) for n, share in fitted),
        *(with_seed(fit_budget(MIXED, n, share), s) for n, share in fitted for s in (0, 7)),
    }
    assert len(found) == 4 + 4 * 2
    for pattern in patterns(n=512, shares="1/4"):
        assert 0.24 < flops_share(pattern, 512) <= 0.25


def test_budgets_of_keys_that_a_tile_reads() -> None:
    (found,) = patterns(
        families=["sinks:4+swa:{}"], n=2048, shares="1/4", cost="visited", seeds=None
    )
    (larger,) = patterns(families=["sinks:4+swa:{}"], n=2048, shares="1/4", seeds=None)
    assert 0.2 < visited_share(found, 2048) <= 0.25 < visited_share(larger, 2048)
    for wrong, said in (
        ({"families": ["block_topk:8,{}"]}, "depends on the text"),
        ({"cost": "keys"}, "unknown cost 'keys'; allowed: flops, visited"),
    ):
        with pytest.raises(UserError, match=said):
            patterns(**{"n": 512, "shares": "1/4", "cost": "visited", "seeds": None, **wrong})


def test_deterministic_families_stand_once_and_random_ones_keep_their_seed_without_seeds() -> None:
    assert [seed_of(pattern) for pattern in patterns(n=512, shares=0.25)] == [None, 0, 7]
    own = patterns(families=["psa:{},seed=5"], n=512, shares=0.25, seeds=None)
    assert [seed_of(pattern) for pattern in own] == [5]


@pytest.mark.parametrize("share", ["1/8", "0.125", " 1 / 8 ", 0.125])
def test_shares_are_fractions_or_numbers(share: Any) -> None:
    assert patterns(n=512, shares=[share]) == patterns(n=512, shares=[1 / 8])


def test_a_choice_that_query_heads_share_buys_more() -> None:
    family = "sinks:4+block_topk:8,{}"
    entry: dict[str, Any] = {"families": family, "n": 512, "shares": 0.25, "seeds": None}
    (alone,), (shared,) = patterns(**entry), patterns(**entry, group=4)
    assert shared == fit_budget(family, 512, 0.25, 4)
    assert (shared.effective_window or 0) > (alone.effective_window or 0)


def test_families_may_have_layers_and_the_whole_budget() -> None:
    entry = {**ENTRY, "families": "swa:{}", "n": 64, "shares": 1, "seeds": [], "layers": "1-2"}
    config = parse_config({"methods": [entry], "tasks": ["needle_128"]})
    (method,) = config.methods
    assert method.pattern.saturated(64) and method.layers == Schedule(listed=(1, 2))


def test_the_example_in_the_help_is_valid() -> None:
    lines = SWEEP_EXAMPLES.partition("a sweep file:\n")[2].splitlines()
    # Entries stand behind a "# " and a brace, or go on in a line that is indented once more.
    shown = [line.strip() for line in lines if line.strip().startswith(("# {method", "#  "))]
    entries = yaml.safe_load("[" + "\n".join(line.lstrip("# ") for line in shown) + "]")
    assert {"split", "budget"} <= {entry["method"] for entry in entries}
    assert parse_config({"methods": entries, "tasks": ["boolq"]}).patterns


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"families": None}, "the entry of 'budget' lacks the key 'families'"),
        ({"families": []}, r"families must be a list of at least 1, got \[\]"),
        ({"n": None}, "the entry of 'budget' lacks the key 'n'"),
        ({"shares": None}, "the entry of 'budget' lacks the key 'shares'"),
        ({"share": 0.5}, "unknown key 'share' in the entry of 'budget'; did you mean 'shares'"),
        ({"families": ["swa:64"]}, "a family has {} for the number that is sought"),
        ({"families": [7]}, r"families\[0\] must be text, got 7"),
        ({"families": ["saa:{}"]}, "unknown method 'saa'; did you mean 'sa'"),
        ({"families": [LOCAL]}, "none of the families draws anything at random"),
        ({"families": ["sinks:4+swa:200+sa:{}"]}, "take a larger share, or another family"),
        ({"n": [0]}, r"n\[0\] must be at least 1, got 0"),
        ({"n": ["4K"]}, r"n\[0\] must be a whole number, got '4K'"),
        ({"shares": [0]}, "above 0 and is at most 1, got 0"),
        ({"shares": ["3/2"]}, "above 0 and is at most 1, got 1.5"),
        ({"shares": ["1/0"]}, "shares are written 1/8 or 0.125, got '1/0'"),
        ({"shares": ["an eighth"]}, "shares are written 1/8 or 0.125, got 'an eighth'"),
        ({"shares": [True]}, r"shares\[0\] must be a number, got True"),
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"seeds": ["x"]}, r"seeds\[0\] must be a whole number, got 'x'"),
    ],
)
def test_mistakes_are_named_in_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        patterns(**change)
    assert "\n" not in str(caught.value)
