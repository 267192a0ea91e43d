"""The public face of patching: arguments, layers, refusals, and real use with generate()."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from sa_patch import SA, SWA, Full, MoBA, patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import (
    Schedule,
    attention_layers,
    format_layers,
    parse_layers,
    stock_patterns,
)
from sa_patch.patching.plan import get_plan
from tests.small_models import FAMILIES, random_tokens, tiny_config, tiny_model


def logits(model: nn.Module, tokens: torch.Tensor, **arguments: object) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(tokens, **arguments).logits
    return result


def test_window_alone_means_stochastic_attention() -> None:
    model = patch_model(tiny_model("llama"), window=6)
    plans = [get_plan(module) for module in attention_layers(model).values()]
    assert [plan.pattern for plan in plans if plan] == [SA(window=6)] * 3


def test_text_form_is_taken() -> None:
    tokens = random_tokens(1, 20)
    model = tiny_model("qwen3")
    by_text = logits(patch_model(model, "swa:window=4"), tokens)
    by_object = logits(patch_model(model, SWA(4)), tokens)
    assert torch.equal(by_text, by_object)


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_layers_left_out_keep_their_stock_attention(stock: str) -> None:
    tokens = random_tokens(2, 24)
    model = tiny_model("llama")
    model.set_attn_implementation(stock)
    layers = attention_layers(model)
    outputs: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    hooks = [
        module.register_forward_hook(lambda _, __, out, index=index: outputs[index].append(out[0]))
        for index, module in layers.items()
    ]
    logits(model, tokens)
    patch_model(model, SWA(3), layers=[1])
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    assert torch.equal(*outputs[0])
    assert not torch.equal(*outputs[1])


@pytest.mark.parametrize("name", ["indices", "block_indices"])
@pytest.mark.parametrize("layers", [[0], [1]], ids=["sparse", "stock"])
def test_keys_that_a_model_chose_itself_are_refused_never_ignored(
    name: str, layers: list[int]
) -> None:
    model, tokens = tiny_model("qwen3"), random_tokens(1, 9)
    chosen: dict[str, Any] = {name: torch.zeros(1, dtype=torch.int64)}
    logits(model, tokens, **chosen)
    patch_model(model, SWA(4), layers=layers)
    with pytest.raises(UserError, match=f"layer 0 .* chooses keys itself .'{name}'.*unpatch"):
        logits(model, tokens, **chosen)
    logits(model, tokens, **{name: None})


def test_layers_with_a_window_of_their_own_are_left_alone() -> None:
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = Gemma3ForCausalLM(config).eval()
    tokens = random_tokens(1, 20)
    stock = logits(model, tokens)
    patch_model(model, SWA(4))
    assert [get_plan(m).pattern for m in attention_layers(model).values()] == [None, SWA(4), None]  # type: ignore[union-attr]
    assert stock_patterns(model) == {0: SWA(8), 1: Full(), 2: SWA(8)}
    assert not torch.equal(logits(model, tokens), stock)
    torch.testing.assert_close(logits(patch_model(model, Full()), tokens), stock)
    # Named on purpose they serve as long as their own window has no effect.
    patch_model(model, SWA(4), layers=[0])
    logits(model, tokens[:, :8])
    with pytest.raises(UserError, match="own sliding window of 8"):
        logits(model, tokens)


def test_generation_with_padding_equals_generation_alone() -> None:
    model = patch_model(tiny_model("qwen3"), SA(3))
    tokens = random_tokens(2, 12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), tokens[:1]], dim=1)
    other = torch.cat([tokens[1:], tokens[1:, :5]], dim=1)
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[0, :5] = 0
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = model.generate(torch.cat([padded, other]), attention_mask=mask, **arguments)
    alone = model.generate(tokens[:1], attention_mask=torch.ones(1, 12), **arguments)
    assert torch.equal(batch[0, 5:], alone[0])


@pytest.mark.parametrize(
    "arguments", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}]
)
def test_generation_modes_run(arguments: dict[str, object]) -> None:
    tokens = random_tokens(2, 9)
    for pattern in (SA(3), SWA(3), MoBA(2, 2)):
        for decode in ("full", "pattern"):
            model = patch_model(tiny_model("llama"), pattern, decode=decode)
            out = model.generate(
                tokens, max_new_tokens=4, pad_token_id=0, eos_token_id=None, **arguments
            )
            assert out.shape == (2, 13)


@pytest.mark.parametrize("decode", ["full", "pattern"])
def test_static_cache_equals_dynamic_cache(decode: str) -> None:
    tokens = random_tokens(2, 20)
    for pattern in (SA(3), SWA(4), MoBA(4, 2)):
        model = patch_model(tiny_model("llama"), pattern, decode=decode)
        arguments = {
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        dynamic = model.generate(tokens, **arguments)
        static = model.generate(tokens, cache_implementation="static", **arguments)
        assert torch.equal(static, dynamic)


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_static_cache_with_unpatched_layers(stock: str) -> None:
    tokens = random_tokens(2, 20)
    model = tiny_model("llama")
    model.set_attn_implementation(stock)
    patch_model(model, SWA(4), layers=[1])
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    dynamic = model.generate(tokens, **arguments)
    static = model.generate(tokens, cache_implementation="static", **arguments)
    # One unfilled slot too many in view moves the logits, but seldom the token.
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits))


def test_decode_full_sees_every_cached_key() -> None:
    model = tiny_model("qwen3")
    tokens = random_tokens(1, 30)
    patch_model(model, SWA(2), decode="full")
    cache = DynamicCache(config=model.config)
    logits(model, tokens[:, :29], past_key_values=cache)
    sparse_prefill = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    step = logits(model, tokens[:, 29:], past_key_values=cache)
    unpatch_model(model)
    stock_cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(sparse_prefill):
        stock_cache.update(keys, values, index)
    assert torch.equal(logits(model, tokens[:, 29:], past_key_values=stock_cache), step)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attention weights": ({"output_attentions": True}, "output_attentions"),
    "ready mask": ({"attention_mask": torch.ones(1, 1, 20, 20).tril()}, "4D attention_mask"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_sparse_layer_cannot_do_is_refused(family: str, what: str) -> None:
    arguments, says = REFUSED[what]
    model = patch_model(tiny_model(family), SA(4))
    with pytest.raises(UserError, match=says):
        logits(model, random_tokens(1, 20), **arguments)


def test_dropout_in_training_is_refused() -> None:
    model = patch_model(tiny_model("llama", attention_dropout=0.1), SA(4)).train()
    with pytest.raises(UserError, match="dropout"):
        model(random_tokens(1, 8))


def test_a_model_loaded_under_our_name_says_what_to_do() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("sa_patch")
    with pytest.raises(UserError, match=r"call sa_patch.patch_model"):
        logits(model, random_tokens(1, 4))
    assert torch.isfinite(logits(patch_model(model, SA(4)), random_tokens(1, 4))).all()


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "needs window="),
    "both": ({"pattern": SA(4), "window": 4}, "not both"),
    "kind": ({"pattern": 12}, "pattern must be"),
    "decode": ({"window": 4, "decode": "none"}, "decode must be"),
    "backend": ({"window": 4, "backend": "tritn"}, "unknown backend"),
    "layer beyond": ({"window": 4, "layers": [0, 9]}, r"layers \[9\] are not"),
    "negative layer": ({"window": 4, "layers": [-1]}, r"layers \[-1\] are not"),
    "no layer": ({"window": 4, "layers": []}, "layers is empty"),
    "half a layer": ({"window": 4, "layers": [1.5]}, "whole numbers"),
    "layers text": ({"window": 4, "layers": "1-x"}, "numbers and ranges"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_leave_the_model_as_it_was(case: str) -> None:
    arguments, says = BAD_ARGUMENTS[case]
    model = tiny_model("llama")
    tokens = random_tokens(1, 12)
    before = logits(model, tokens)
    with pytest.raises(UserError, match=says):
        patch_model(model, **arguments)
    assert torch.equal(logits(model, tokens), before)
    assert model.config._attn_implementation == "sdpa"


def test_models_that_cannot_be_patched_say_why() -> None:
    with pytest.raises(UserError, match="PreTrainedModel"):
        patch_model(nn.Linear(2, 2), window=4)
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="encoder-decoder"):
        patch_model(t5, window=4)


def test_gpt2_goes_through_the_interface_too() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    tokens = random_tokens(2, 20)
    stock = logits(model, tokens)
    with patched(model, Full()):
        torch.testing.assert_close(logits(model, tokens), stock)
    with patched(model, SA(3)):
        assert not torch.allclose(logits(model, tokens), stock, atol=1e-3)
    assert torch.equal(logits(model, tokens), stock)


def test_layer_text_reads_back() -> None:
    assert parse_layers("0,1,5-7") == {0, 1, 5, 6, 7} == parse_layers("0+1+5-7")
    assert parse_layers(3) == {3}
    assert format_layers(parse_layers("0,1,5-7,9")) == "0-1,5-7,9"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0,7-3", "a range of layers ends before it begins: '7-3'; write 3-7"),
        ("\N{SUPERSCRIPT TWO}", "layers are written as numbers and ranges"),
        ("4-", "layers are written as numbers and ranges, such as 4-35 or 0,1,5-7; got '4-'"),
    ],
)
def test_layer_text_of_another_form_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_layers(text)
    with pytest.raises(UserError, match=re.escape(sentence)):
        Schedule.read({text: "full", 1: "swa:4"})


def test_configuration_of_another_model_is_not_touched() -> None:
    config = tiny_config("llama")
    model = tiny_model("llama")
    model.config = config
    patch_model(model, window=4)
    assert config._attn_implementation != "sa_patch"


def test_continuous_batching_is_refused_by_patched_models_alone() -> None:
    """transformers would refuse it too, or put FlashAttention, if installed, in our place."""
    model = patch_model(tiny_model("llama"), SWA(4))
    with pytest.raises(UserError, match="use generate\\(\\) with batches padded on the left"):
        model.generate_batch(inputs=[[3, 4, 5]])
    with pytest.raises(UserError, match="transformers serve"):
        model.init_continuous_batching()
    unpatch_model(model)
    assert "init_continuous_batching" not in model.__dict__
