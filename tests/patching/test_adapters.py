"""PEFT adapters on patched models, and models that are patched with an adapter on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sa_patch import SA, SWA, Full, Tail, patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns
from sa_patch.patterns import Pattern, Sinks
from tests.small_models import PAD, random_tokens, tiny_model

TOKENS = random_tokens(2, 20)
MASK = torch.ones_like(TOKENS)
MASK[0, :6] = 0
PREFIX = 5


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits of the real tokens, [tokens, vocabulary]."""
    out = model(input_ids=TOKENS, attention_mask=MASK).logits[:, -TOKENS.shape[1] :]
    real: Tensor = out[MASK.bool()]
    return real


def written(model: Any) -> Tensor:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "max_new_tokens": 6}
    tokens: Tensor = model.generate(input_ids=TOKENS, attention_mask=MASK, **options)
    return tokens


def with_adapter(model: PreTrainedModel, config: Any) -> PeftModel:
    """The model in an adapter with wide random weights, whose effect shows."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        adapted = get_peft_model(model, config).eval()
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.5)
    return adapted


def lora() -> LoraConfig:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=modules)


def prefix() -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)


@pytest.mark.parametrize("order", ["patched first", "adapted first"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lora_is_sparse_whichever_came_first(family: str, order: str) -> None:
    merged = with_adapter(tiny_model(family), lora()).merge_and_unload()
    stock = logits(merged)
    sparse = logits(patch_model(merged, SA(3)))
    bare = tiny_model(family)
    if order == "patched first":
        patch_model(bare, SA(3))
        adapted = with_adapter(bare, lora())
    else:
        adapted = with_adapter(bare, lora())
        assert patch_model(adapted, SA(3)) is adapted
    assert set(layer_patterns(adapted).values()) == {SA(3)}
    assert not torch.allclose(sparse, stock, atol=1e-2)
    torch.testing.assert_close(logits(adapted), sparse, atol=1e-3, rtol=1e-3)
    assert torch.equal(written(adapted), written(merged))
    # The adapter goes off, and comes off, with the pattern in place.
    plain = logits(patch_model(tiny_model(family), SA(3)))
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    unpatch_model(adapted)
    torch.testing.assert_close(logits(adapted), stock, atol=1e-3, rtol=1e-3)
    patch_model(adapted, SA(3))
    bare = adapted.unload()
    assert torch.equal(logits(bare), plain)
    assert torch.equal(logits(unpatch_model(bare)), logits(tiny_model(family)))


def test_unpatching_an_adapted_model_is_bit_identical() -> None:
    adapted = with_adapter(tiny_model("llama"), lora())
    stock, attributes = logits(adapted), {n: set(vars(m)) for n, m in adapted.named_modules()}
    for pattern, decode in ((SA(3), "full"), (SWA(3), "pattern")):
        with patched(adapted, pattern, decode=decode):
            assert not torch.allclose(logits(adapted), stock, atol=1e-2)
        assert torch.equal(logits(adapted), stock)
        assert {n: set(vars(m)) for n, m in adapted.named_modules()} == attributes


def test_merging_keeps_the_pattern_and_saving_writes_the_stock_files(tmp_path: Path) -> None:
    adapted = with_adapter(tiny_model("llama"), lora())
    stock = logits(adapted)
    patch_model(adapted, SA(3), decode="pattern")
    sparse = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), sparse, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    for path in tmp_path.glob("*/*.json"):
        assert "sa_patch" not in path.read_text()
        assert "attn_implementation" not in json.loads(path.read_text())
    again = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(again), stock)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded), logits(unpatch_model(merged)))


def test_lora_trains_through_the_pattern() -> None:
    adapted = patch_model(with_adapter(tiny_model("llama"), lora()), SA(3)).train()
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = [weight.grad for weight in adapted.parameters() if weight.requires_grad]
    assert gradients and all(grad is not None and grad.abs().sum() > 0 for grad in gradients)


def test_an_adapter_of_the_model_itself_works() -> None:
    """`add_adapter`, by which transformers attaches adapters without a wrapper."""
    model = patch_model(tiny_model("llama"), SA(3))
    plain = logits(model)
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(unpatch_model(model)), logits(tiny_model("llama")))


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_count_as_tokens_of_the_prompt(kind: Any, decode: str) -> None:
    options = {"encoder_hidden_size": 8} if kind is PromptEncoderConfig else {}
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, **options)
    model = tiny_model("llama")
    adapted = with_adapter(model, config)
    stock, text = logits(adapted), written(adapted)
    patch_model(adapted, SWA(4), decode=decode)
    with torch.no_grad():
        words = torch.cat([adapted.get_prompt(2), adapted.word_embeddings(TOKENS)], dim=1)
        mask = torch.cat([torch.ones(2, PREFIX, dtype=torch.int64), MASK], dim=1)
        alone = model(inputs_embeds=words, attention_mask=mask).logits[:, PREFIX:][MASK.bool()]
    torch.testing.assert_close(logits(adapted), alone)
    assert not torch.allclose(alone, stock, atol=1e-2)
    assert written(adapted).shape == text.shape
    unpatch_model(adapted)
    assert torch.equal(logits(adapted), stock)
    assert torch.equal(written(adapted), text)


@pytest.mark.parametrize("decode", ["full", "pattern"])
def test_prefix_tuning_is_refused_where_prompts_must_be_whole(decode: str) -> None:
    adapted = with_adapter(tiny_model("llama"), prefix())
    stock = logits(adapted)
    with pytest.raises(UserError, match="PREFIX_TUNING adapter puts keys into the cache"):
        patch_model(adapted, SA(3), decode=decode)
    with pytest.raises(UserError, match="PREFIX_TUNING"):
        patch_model(adapted, SWA(3), layers={1: Tail(2)}, decode=decode)
    assert adapted.get_base_model().config._attn_implementation == "sdpa"
    assert torch.equal(logits(adapted), stock)


@pytest.mark.parametrize("layers", [None, [2]])
def test_a_prefix_put_on_later_is_noticed(layers: list[int] | None) -> None:
    model = tiny_model("llama")
    adapted = with_adapter(model, prefix())
    stock, text = logits(adapted), written(adapted)
    patch_model(model, SA(3), layers=layers)  # the model itself, which knows of no adapter
    for use in (logits, written):
        with pytest.raises(UserError, match=f"in one piece, and {PREFIX} keys are cached"):
            use(adapted)
    with adapted.disable_adapter():
        logits(adapted)
    unpatch_model(model)
    assert torch.equal(logits(adapted), stock)
    assert torch.equal(written(adapted), text)


@torch.no_grad()
def by_definition(adapted: PeftModel, pattern: Pattern) -> Tensor:
    """Logits of the stock model behind the prefix under a dense mask, row by row."""
    rows = []
    for row, start in ((0, 6), (1, 0)):
        tokens = TOKENS[row : row + 1, start:]
        n = PREFIX + tokens.shape[1]
        seen = pattern.visible(torch.arange(PREFIX, n), n)[None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        # As PEFT counts: positions go on behind the prefix, padding included.
        positions = PREFIX + torch.arange(start, TOKENS.shape[1])[None]
        out = adapted.get_base_model()(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=adapted.get_prompt(1),
        )
        rows.append(out.logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("pattern", [SWA(4), Sinks(2) | SWA(3), Full()], ids=str)
def test_the_pattern_goes_on_over_prefix_and_prompt(pattern: Pattern, decode: str) -> None:
    adapted = with_adapter(tiny_model("llama"), prefix())
    stock, text = logits(adapted), written(adapted)
    expected = by_definition(adapted, pattern)
    patch_model(adapted, pattern, decode=decode)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(expected, stock, atol=1e-3) == isinstance(pattern, Full)
    assert written(adapted).shape == text.shape
    unpatch_model(adapted)
    assert torch.equal(logits(adapted), stock)
    assert torch.equal(written(adapted), text)
