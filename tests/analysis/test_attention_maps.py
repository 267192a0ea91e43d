"""Attention maps are the model's own weights, and what a pattern's mask leaves of them."""

from __future__ import annotations

import pytest
import torch

from sa_patch import unpatch_model
from sa_patch.analysis.attention_maps import attention_maps, head_inputs
from sa_patch.errors import UserError
from sa_patch.patterns import SA, SWA, BlockTopK, Full, MoBA, Sinks
from tests.small_models import random_tokens, tiny_model


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_full_map_is_what_the_models_own_attention_returns(family: str) -> None:
    model = tiny_model(family).eval()
    tokens = random_tokens(1, 21)
    inputs = head_inputs(model, tokens, 1)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        own = model(tokens, output_attentions=True).attentions[1][0]
    for head in range(4):
        (shown,) = attention_maps(inputs, [Full()], 1, head)
        assert torch.allclose(shown.weights, own[head], atol=1e-5)
        assert shown.kept == pytest.approx(1) and shown.mean_keys == 11


def test_masked_maps_are_renormalised_over_the_visible_keys() -> None:
    model = tiny_model("llama").eval()
    inputs = head_inputs(model, random_tokens(1, 30), 0)
    composed = Sinks(2) | SWA(3)
    patterns = [Full(), SWA(5), SA(4, 1, per_head=True), composed, MoBA(4), BlockTopK(2, 1)]
    maps = attention_maps(inputs, patterns, 0, 3)
    for one in maps:
        expected = one.pattern.visible(torch.arange(30), 30, heads=4, q=inputs.q, k=inputs.k)
        assert torch.equal(one.visible, expected[min(3, len(expected) - 1)])
        left = maps[0].weights * one.visible
        assert torch.allclose(one.weights, left / left.sum(-1, keepdim=True), atol=1e-6)
        assert one.kept == pytest.approx(float(left.sum(-1).mean()))
        assert one.mean_keys == pytest.approx(one.visible.sum().item() / 30)
    assert 0 < maps[1].kept < 1


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").eval()
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        head_inputs(model, tokens, 2)
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(unpatch_model(model)(tokens).logits, before)


def test_bad_places_and_prompts() -> None:
    model = tiny_model("llama").eval()
    with pytest.raises(UserError, match="at least 2 tokens, and the prompt has 1"):
        head_inputs(model, random_tokens(1, 1), 0)
    with pytest.raises(UserError, match="more than the 2,048 of a map"):
        head_inputs(model, torch.zeros(1, 2049, dtype=torch.int64), 0)
    with pytest.raises(UserError, match="layer 3 has no attention"):
        head_inputs(model, random_tokens(1, 5), 3)
