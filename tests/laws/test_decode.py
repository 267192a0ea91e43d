"""What DESIGN section 2 says of decoding: caches, chunks and generation on tiny models.

`decode="full"`: a generated token sees all cached keys, as in stock attention.
`decode="pattern"`: the pattern goes on, so a prefix-stable one does not notice the cache.
Several tokens behind a cache are prompt in both: law 8.

Seen red when decode="full" went on with the pattern and "pattern" did not, chunks began at position
0, a static cache was taken for full, and a model's own window or output_attentions were let
through.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sa_patch import patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patterns import SA
from tests.laws.drawn import MODEL_METHODS, MODEL_PREFIX_STABLE, narrow_pattern, patterns
from tests.laws.strategies import MODEL_BACKENDS
from tests.small_models import FAMILIES, PAD, random_tokens, tiny_model

TOLERANCE = 2e-4  # absolute, float32 logits of size 1 to 10
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@torch.no_grad()
def in_chunks(model: PreTrainedModel, tokens: Tensor, cuts: list[int], mask: Tensor) -> Tensor:
    """Logits of a prompt that is fed in chunks through one cache."""
    cache = DynamicCache(config=model.config)
    bounds = [0, *cuts, tokens.shape[1]]
    parts = [
        model(
            tokens[:, first:last],
            attention_mask=mask[:, :last],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("method", MODEL_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_full_decode_is_stock_attention_over_the_patched_prefills_cache(
    family: str, method: str
) -> None:
    model = patch_model(tiny_model(family), narrow_pattern(method))
    tokens = random_tokens(2, 32)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :30], past_key_values=cache, use_cache=True)
    copied = copy.deepcopy(cache)

    def decode(cache: DynamicCache) -> Tensor:
        one = model(tokens[:, 30:31], past_key_values=cache, use_cache=True).logits
        two = model(tokens[:, 31:32], past_key_values=cache, use_cache=True).logits
        return torch.cat([one, two], dim=1)

    ours = decode(cache)
    unpatch_model(model)
    assert torch.equal(ours, decode(copied))


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize("method", MODEL_PREFIX_STABLE)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama"])
@settings(max_examples=4)
@given(data=st.data())
@torch.no_grad()
def test_a_prompt_in_pieces_equals_the_prompt_in_one_piece(
    family: str, method: str, backend: str, data: st.DataObject
) -> None:
    drawn = patterns(method, max_window=10).filter(lambda pattern: pattern.prefix_stable)
    pattern = data.draw(drawn)
    decode = data.draw(st.sampled_from(["full", "pattern"]))
    model = patch_model(tiny_model(family), pattern, decode=decode, backend=backend)
    n = data.draw(st.integers(3, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), min_size=1, max_size=4)))
    if decode == "full":
        # A single token behind a cache counts as written.
        ends = [*cuts[1:], n]
        cuts = [cut for cut, end in zip(cuts, ends, strict=True) if end - cut > 1] or [n - 2]
    padding = data.draw(st.integers(0, min(cuts[0], n - 1) - 1))
    tokens = random_tokens(2, n, seed=n)
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    whole = model(tokens, attention_mask=mask).logits
    difference = (in_chunks(model, tokens, cuts, mask) - whole).abs()
    assert difference[0].max() <= TOLERANCE
    assert difference[1, padding:].max() <= TOLERANCE


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
@pytest.mark.parametrize("method", MODEL_METHODS)
@torch.no_grad()
def test_the_last_token_through_the_cache_sees_the_same_keys(method: str, backend: str) -> None:
    """In a model of one layer the cache holds no trace of the pattern, so this binds SA too."""
    model = tiny_model("llama", num_hidden_layers=1)
    patch_model(model, narrow_pattern(method), decode="pattern", backend=backend)
    tokens = random_tokens(2, 31)
    whole = model(tokens).logits[:, -1]
    last = in_chunks(model, tokens, [30], torch.ones_like(tokens))[:, -1]
    assert (last - whole).abs().max() <= TOLERANCE


@pytest.mark.parametrize("method", MODEL_PREFIX_STABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_a_cache_equals_that_without(family: str, method: str) -> None:
    model = patch_model(tiny_model(family), narrow_pattern(method), decode="pattern")
    tokens = random_tokens(2, 25)
    cached = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)
    again = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **GREEDY
    )
    assert torch.equal(cached, again)


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("method", MODEL_METHODS)
def test_every_way_to_generate_runs_and_keeps_the_prompt(method: str, decode: str) -> None:
    model = patch_model(tiny_model("qwen3"), narrow_pattern(method), decode=decode)
    tokens = random_tokens(2, 20)
    ones = torch.ones_like(tokens)
    greedy = model.generate(tokens, attention_mask=ones, **GREEDY)
    one_beam_wide = model.generate(
        tokens, attention_mask=ones, **(GREEDY | {"num_beams": 3, "num_return_sequences": 3})
    )
    torch.manual_seed(0)
    sampled = model.generate(
        tokens, attention_mask=ones, **(GREEDY | {"do_sample": True, "top_k": 1})
    )
    assert one_beam_wide.shape == (6, 28)
    assert torch.equal(sampled, greedy), "sampling from the single best token is greedy"
    for result in (greedy, one_beam_wide[::3], sampled):
        assert torch.equal(result[:, :20], tokens)


@pytest.mark.parametrize("method", MODEL_PREFIX_STABLE)
def test_beam_search_with_a_cache_equals_that_without(method: str) -> None:
    model = patch_model(tiny_model("qwen3"), narrow_pattern(method), decode="pattern")
    tokens = random_tokens(2, 20)
    options = GREEDY | {"num_beams": 3, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(
        model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options)
    )


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("method", MODEL_METHODS)
@torch.no_grad()
def test_a_static_cache_gives_what_a_dynamic_one_gives(method: str, decode: str) -> None:
    model = patch_model(tiny_model("llama"), narrow_pattern(method), decode=decode)
    tokens = random_tokens(2, 25)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    static = StaticCache(config=model.config, max_cache_len=48)
    first = model(tokens[:, :20], attention_mask=mask[:, :20], past_key_values=static).logits
    # What is behind the prompt is prompt too, which SA takes in one piece only.
    last = 21 if method == "sa" else 25
    second = model(tokens[:, 20:last], attention_mask=mask[:, :last], past_key_values=static).logits
    expected = in_chunks(model, tokens[:, :last], [20], mask[:, :last])
    for row, start in ((0, 0), (1, 4)):
        difference = torch.cat([first, second], 1)[row, start:] - expected[row, start:]
        assert difference.abs().max() <= TOLERANCE
    options = GREEDY | {"attention_mask": mask, "disable_compile": True}
    generated = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(generated, model.generate(tokens, **options))


@pytest.mark.parametrize("method", MODEL_METHODS)
def test_attention_weights_are_refused_with_a_reason(method: str) -> None:
    model = patch_model(tiny_model("qwen3"), narrow_pattern(method))
    with pytest.raises(UserError, match="output_attentions"):
        model(random_tokens(1, 30), output_attentions=True)


def test_a_ready_four_dimensional_mask_is_refused_with_a_reason() -> None:
    model = patch_model(tiny_model("qwen3"), SA(3))
    with pytest.raises(UserError, match="4D"):
        model(random_tokens(1, 6), attention_mask=torch.ones(1, 1, 6, 6).tril().bool())


def test_a_models_own_window_is_served_or_refused_never_ignored() -> None:
    model = tiny_model("mistral", sliding_window=8)
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        stock = model(tokens).logits
        patch_model(model, SA(8))
        assert (model(tokens).logits - stock).abs().max() <= TOLERANCE
    with pytest.raises(UserError, match="sliding window"):
        model(random_tokens(1, 20))
