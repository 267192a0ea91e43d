"""Which layers are sparse: every way to write it, what it means to a model, and each mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from sa_patch import SA, SWA, Full, MoBA, Sinks, patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import Schedule, layer_patterns, observe_layers
from sa_patch.patterns import Pattern
from tests.small_models import random_tokens, tiny_model

PATTERNS = [None, SWA(3), SA(4, seed=2), Sinks(2) | SWA(3)]


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tokens).logits
    return result


@given(st.dictionaries(st.integers(0, 40), st.sampled_from(PATTERNS), min_size=1))
def test_what_is_written_reads_back(own: dict[int, Pattern | None]) -> None:
    schedule = Schedule.read(own)
    plain = schedule.to_plain()
    assert Schedule.read(plain) == schedule
    assert Schedule.read(yaml.safe_load(yaml.safe_dump(plain))) == schedule
    assert dict(schedule.own or ()) == own
    assert set(schedule.named) == set(own)
    reordered = dict(reversed(own.items()))
    assert Schedule.read(reordered).to_plain() == plain


def test_lists_and_texts_are_one_schedule() -> None:
    assert Schedule.read("4-6,8") == Schedule.read([8, 5, 4, 6]) == Schedule.read("4-6+8")
    assert Schedule.read("4-6,8").to_plain() == [4, 5, 6, 8]
    assert Schedule.read(None).to_plain() is None
    assert Schedule.read(Schedule.read([1])) == Schedule.read(1)
    assert str(Schedule.read({0: "full", 1: None, 2: "swa:4"})) == "0-1: full; 2: swa:window=4"
    assert (str(Schedule.read("1,2")), str(Schedule())) == ("1-2", "")


@pytest.mark.parametrize(
    ("pattern", "layers", "expected"),
    [
        (SWA(4), {0: "full"}, [None, SWA(4), SWA(4)]),
        (SWA(4), {"0,2": "sinks:2+swa:3"}, [Sinks(2) | SWA(3), SWA(4), Sinks(2) | SWA(3)]),
        (SWA(4), {"1-2": MoBA(2), 0: None}, [None, MoBA(2), MoBA(2)]),
        (None, {1: SA(3)}, [None, SA(3), None]),
        (None, {1: Full()}, [None, None, None]),
        (SWA(4), "1", [None, SWA(4), None]),
        (SWA(4), None, [SWA(4)] * 3),
    ],
)
def test_every_layer_gets_its_pattern(
    pattern: Pattern | None, layers: Any, expected: list[Pattern | None]
) -> None:
    model = patch_model(tiny_model("llama"), pattern, layers=layers)
    assert layer_patterns(model) == dict(enumerate(expected))
    assert layer_patterns(unpatch_model(model)) == dict.fromkeys(range(3))


def test_a_mapping_of_one_pattern_equals_that_pattern() -> None:
    tokens = random_tokens(2, 24)
    model = tiny_model("llama")
    stock = logits(model, tokens)
    everywhere = logits(patch_model(model, SWA(3)), tokens)
    assert torch.equal(logits(patch_model(model, layers={"0-2": "swa:3"}), tokens), everywhere)
    assert torch.equal(logits(patch_model(model, SWA(3), layers={"0-2": "full"}), tokens), stock)
    two = logits(patch_model(model, SWA(3), layers=[0, 2]), tokens)
    assert torch.equal(logits(patch_model(model, SWA(3), layers={1: None}), tokens), two)
    with patched(model, layers={1: "sa:2"}):
        assert not torch.equal(logits(model, tokens), two)
    assert torch.equal(logits(model, tokens), two)


def test_a_mapping_leaves_the_layers_with_their_own_window_alone() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    )
    model = patch_model(Gemma3ForCausalLM(config).eval(), SWA(4), layers={1: SA(3)})
    assert layer_patterns(model) == {0: None, 1: SA(3), 2: SWA(4), 3: None}


MISTAKES: dict[str, tuple[Any, str]] = {
    "twice": ({"0-1": "swa:3", 1: None}, "names layer 1 twice"),
    "beyond": ({"1-4": "swa:3"}, r"layers \[3, 4\] are not attention layers .* it has 0-2"),
    "kind": ({0: 12}, "layers 0 must be given a pattern"),
    "method": ({0: "swaa:3"}, "did you mean 'swa'"),
    "text": ({"first": "swa:3"}, "numbers and ranges"),
    "key": ({None: "swa:3"}, "whole numbers"),
    "empty": ({}, "layers is empty"),
    "no layer": ({"": "swa:3"}, "layers is empty"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_the_model_as_it_was(case: str) -> None:
    layers, says = MISTAKES[case]
    model, tokens = tiny_model("llama"), random_tokens(1, 12)
    before = logits(model, tokens)
    with pytest.raises(UserError, match=says) as caught:
        patch_model(model, SWA(3), layers=layers)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model, tokens), before)


def test_observers_see_the_layers_they_asked_for_until_the_next_patch() -> None:
    model = patch_model(tiny_model("llama"), SWA(3), layers={2: None})
    seen: list[tuple[int, tuple[int, ...], Mapping[str, Any]]] = []

    def observer(layer: int, q: torch.Tensor, k: torch.Tensor, spans: Any) -> None:
        seen.append((layer, spans.lengths, {"q": q.shape[1:3], "k": k.shape[1:3]}))

    observe_layers(model, observer, [1, 2])
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad():
        model(tokens, attention_mask=mask)
    assert seen == [(1, (5, 9), {"q": (4, 9), "k": (2, 9)})]
    logits(patch_model(model, SWA(3)), tokens)
    assert len(seen) == 1
