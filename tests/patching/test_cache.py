"""Caches that drop what no later query will see: the same logits, in bounded memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from sa_patch import SA, SWA, Sinks, patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import attention_layers
from sa_patch.patching.cache import SPARE_TOKENS, ReachLayer
from sa_patch.patterns import Pattern
from tests.small_models import FAMILIES, PAD, random_tokens, tiny_model

TOLERANCE = 2e-4  # absolute, float32 logits of size 1 to 10
REACHES: list[tuple[Pattern, int]] = [
    (SWA(5), 4 + SPARE_TOKENS),
    (Sinks(3) | SWA(6), 3 + 5 + SPARE_TOKENS),
    (Sinks(2), 2 + SPARE_TOKENS),
]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Caches as they are without this module, to compare with."""
    monkeypatch.setattr("sa_patch.patching.cache.DropBeyondReach.__call__", lambda *_: None)
    return monkeypatch


def held(cache: DynamicCache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


@torch.no_grad()
def in_steps(
    model: PreTrainedModel, tokens: Tensor, bounds: list[int], mask: Tensor, cache: Any = None
) -> tuple[Tensor, DynamicCache]:
    """Logits of tokens that are fed in pieces through one cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = [
        model(
            tokens[:, first:last],
            attention_mask=mask[:, :last],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize(("pattern", "bound"), REACHES, ids=lambda value: str(value))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_long_generation_is_the_same_in_bounded_memory(
    family: str, pattern: Pattern, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(2, 20)
    model = patch_model(tiny_model(family), pattern, decode="pattern")
    options: dict[str, Any] = {**GREEDY, "max_new_tokens": 200, "return_dict_in_generate": True}
    options |= {"output_logits": True, "attention_mask": torch.ones_like(tokens)}
    ours = model.generate(tokens, **options)
    assert set(held(ours.past_key_values)) == {bound}
    assert ours.past_key_values.get_seq_length() == 219
    monkeypatch.setattr("sa_patch.patching.cache.DropBeyondReach.__call__", lambda *_: None)
    kept = model.generate(tokens, **options)
    assert set(held(kept.past_key_values)) == {219}
    assert torch.equal(ours.sequences, kept.sequences)
    for a, b in zip(ours.logits, kept.logits, strict=True):
        assert (a - b).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5)
@given(data=st.data())
def test_chunks_of_any_size_equal_one_shot(family: str, data: st.DataObject) -> None:
    sinks, window = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 12))
    pattern = SWA(window) if not sinks else Sinks(sinks) | SWA(window)
    model = patch_model(tiny_model(family), pattern, decode="pattern")
    n = data.draw(st.integers(60, 140))
    cuts = data.draw(st.sets(st.integers(1, n - 1), min_size=1, max_size=8))
    padding = data.draw(st.integers(0, 45))
    tokens, mask = random_tokens(3, n, seed=n), torch.ones(3, n, dtype=torch.int64)
    mask[1, :padding], mask[2, : padding // 2] = 0, 0
    cuts = {cut for cut in cuts if cut > padding}
    stepped, cache = in_steps(model, tokens, [0, *sorted(cuts), n], mask)
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
    for row, start in enumerate((0, padding, padding // 2)):
        assert (stepped - whole)[row, start:].abs().max() <= TOLERANCE
    assert cache.get_seq_length() == n
    if n - padding > sinks + window - 1 + SPARE_TOKENS:
        assert set(held(cache)) == {sinks + window - 1 + SPARE_TOKENS}


def test_rows_drop_together_once_the_shortest_can() -> None:
    model = patch_model(tiny_model("llama"), Sinks(2) | SWA(4), decode="pattern")
    tokens, mask = random_tokens(2, 120), torch.ones(2, 120, dtype=torch.int64)
    mask[0, :50] = 0
    bound = 2 + 3 + SPARE_TOKENS
    _, cache = in_steps(model, tokens, [0, 50 + bound], mask)
    assert set(held(cache)) == {50 + bound}
    _, cache = in_steps(model, tokens, [50 + bound, 51 + bound], mask, cache)
    assert set(held(cache)) == {bound}


def test_dropped_keys_are_freed() -> None:
    """A slice would hold on to the memory of the whole prompt."""
    model = patch_model(tiny_model("llama"), SWA(4), decode="pattern")
    _, cache = in_steps(model, random_tokens(1, 300), [0, 300], torch.ones(1, 300))
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_other_layers_keep_all(keep_all: pytest.MonkeyPatch) -> None:
    tokens, mask = random_tokens(2, 90), torch.ones(2, 90, dtype=torch.int64)
    layers = {0: SWA(4), 1: "full", 2: Sinks(1) | SWA(5)}
    model = patch_model(tiny_model("llama"), layers=layers, decode="pattern")
    bounds = [0, 60, *range(61, 91)]
    plain, _ = in_steps(model, tokens, bounds, mask)
    keep_all.undo()
    ours, cache = in_steps(model, tokens, bounds, mask)
    assert held(cache) == [3 + SPARE_TOKENS, 90, 5 + SPARE_TOKENS]
    assert (ours - plain).abs().max() <= TOLERANCE
    drawn = patch_model(tiny_model("llama"), SA(4), layers={0: None}, decode="pattern")
    assert held(in_steps(drawn, tokens, bounds, mask)[1]) == [90] * 3


@pytest.mark.parametrize("prompt", [20, 70])
def test_beam_search_moves_the_rows(prompt: int, keep_all: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny_model("qwen3"), Sinks(2) | SWA(4), decode="pattern")
    tokens = random_tokens(2, prompt)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 60, "attention_mask": mask}
    plain = model.generate(tokens, **options)
    keep_all.undo()
    assert torch.equal(model.generate(tokens, **options), plain)


def test_padding_other_than_on_the_left_keeps_all() -> None:
    model = patch_model(tiny_model("llama"), SWA(4), decode="pattern")
    tokens, mask = random_tokens(2, 100), torch.ones(2, 100, dtype=torch.int64)
    mask[0, 60:80] = 0
    stepped, cache = in_steps(model, tokens, [0, 80, 81, 100], mask)
    assert set(held(cache)) == {100}
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask).logits
    real = mask.bool()
    assert (stepped - whole)[real].abs().max() <= TOLERANCE


@pytest.mark.parametrize("decode", ["full", "pattern"])
def test_static_caches_and_full_decoding_keep_all(decode: str) -> None:
    model = patch_model(tiny_model("llama"), SWA(4), decode=decode)
    tokens, ones = random_tokens(1, 80), torch.ones(1, 80)
    static = StaticCache(config=model.config, max_cache_len=80)
    in_steps(model, tokens, [0, 79, 80], ones, static)
    assert not any(isinstance(layer, ReachLayer) for layer in static.layers)
    _, dynamic = in_steps(model, tokens, [0, 79, 80], ones)
    assert set(held(dynamic)) == ({80} if decode == "full" else {3 + SPARE_TOKENS})


def test_a_cache_made_without_a_configuration_is_served_too() -> None:
    model = patch_model(tiny_model("llama"), layers={1: SWA(4)}, decode="pattern")
    _, cache = in_steps(model, random_tokens(1, 80), [0, 80], torch.ones(1, 80), DynamicCache())
    assert held(cache) == [80, 3 + SPARE_TOKENS, 80]


def test_a_cache_that_the_stock_model_began_is_taken_over() -> None:
    model, tokens, ones = tiny_model("llama"), random_tokens(1, 90), torch.ones(1, 90)
    _, cache = in_steps(model, tokens, [0, 60], ones)
    copied = copy.deepcopy(cache)
    patch_model(model, Sinks(2) | SWA(4), decode="pattern", layers=[0])
    ours, cache = in_steps(model, tokens, [60, 61, 90], ones, cache)
    assert held(cache) == [5 + SPARE_TOKENS, 90, 90]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sa_patch.patching.cache.DropBeyondReach.__call__", lambda *_: None)
        kept, _ = in_steps(model, tokens, [60, 61, 90], ones, copied)
    assert (ours - kept).abs().max() <= TOLERANCE


def test_a_cache_that_has_dropped_serves_nothing_else() -> None:
    tokens, ones = random_tokens(1, 90), torch.ones(1, 90)
    model = patch_model(tiny_model("llama"), SWA(4), decode="pattern")
    _, cache = in_steps(model, tokens, [0, 80], ones)
    for other in (SWA(8), SA(4)):
        with patched(model, other, decode="pattern"), pytest.raises(UserError, match="new cache"):
            in_steps(model, tokens, [80, 81], ones, copy.deepcopy(cache))
    with patched(model, SWA(4)), pytest.raises(UserError, match="new cache"):
        in_steps(model, tokens, [80, 81], ones, copy.deepcopy(cache))
    hidden = ones.clone()
    hidden[0, :3] = 0
    with pytest.raises(UserError, match="attention_mask now shows another"):
        in_steps(model, tokens, [80, 81], hidden, copy.deepcopy(cache))
    in_steps(model, tokens, [80, 81], ones, cache)
    with pytest.raises(UserError, match="start with a new cache"):
        in_steps(unpatch_model(model), tokens, [81, 82], ones, cache)


def test_candidates_can_be_taken_back_as_far_as_spare_tokens_reach() -> None:
    tokens, ones = random_tokens(1, 120), torch.ones(1, 120)
    model = patch_model(tiny_model("llama"), Sinks(2) | SWA(4), decode="pattern")
    _, cache = in_steps(model, tokens, [0, 100], ones)
    cache.crop(-SPARE_TOKENS)
    assert cache.get_seq_length() == 100 - SPARE_TOKENS
    again, cache = in_steps(model, tokens, [100 - SPARE_TOKENS, 120], ones, cache)
    with torch.no_grad():
        whole = model(tokens).logits[:, 100 - SPARE_TOKENS :]
    assert (again - whole).abs().max() <= TOLERANCE
    with pytest.raises(UserError, match=f"no more than {SPARE_TOKENS} tokens"):
        cache.crop(-SPARE_TOKENS - 1)


def test_assisted_decoding_is_greedy_decoding() -> None:
    model = patch_model(tiny_model("llama"), Sinks(2) | SWA(4), decode="pattern")
    tokens = random_tokens(1, 12).repeat(1, 6)
    options = {**GREEDY, "max_new_tokens": 80, "attention_mask": torch.ones_like(tokens)}
    greedy = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=8, **options), greedy)


def zeroed(layer: DynamicLayer) -> None:
    """`DynamicLayer.reset` of transformers 5.17."""
    if layer.is_initialized:
        layer.keys.zero_()
        layer.values.zero_()


@pytest.mark.parametrize("reset", [DynamicLayer.reset, zeroed], ids=["own", "5.17"])
def test_a_cache_can_be_used_again_after_a_reset(
    reset: Callable[[DynamicLayer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicLayer, "reset", reset)
    tokens, ones = random_tokens(1, 90), torch.ones(1, 90)
    model = patch_model(tiny_model("llama"), SWA(4), decode="pattern")
    first, cache = in_steps(model, tokens, [0, 80, 90], ones)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(in_steps(model, tokens, [0, 80, 90], ones, cache)[0], first)


def test_unpatching_takes_the_hooks_away_from_copies_too() -> None:
    model = tiny_model("llama")
    patch_model(model, SWA(4), decode="pattern", layers=[0, 2])
    other = copy.deepcopy(model)

    def hooks(model: PreTrainedModel) -> list[int]:
        return [len(m._forward_pre_hooks) for m in attention_layers(model).values()]

    assert hooks(model) == hooks(other) == [1, 0, 1]
    assert hooks(unpatch_model(other)) == [0, 0, 0]
    assert hooks(model) == [1, 0, 1]
    patch_model(model, SWA(4), decode="pattern")
    assert hooks(model) == [1, 1, 1]
    with patched(model, SA(4), decode="pattern"):
        assert hooks(model) == [0, 0, 0]
    assert hooks(model) == [1, 1, 1]
