"""Models that change the softmax itself, by a learned sink or a soft cap: prompts and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sa_patch import PSA, SA, SWA, MoBA, Sinks, Tail, patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns
from sa_patch.patterns import Pattern
from tests.patching.dense_oracle import oracle_logits
from tests.patching.families import FAMILIES, build
from tests.small_models import PAD, random_tokens

# Every layer a full one, so that every layer is patched.
FULL = {"layer_types": ["full_attention", "full_attention"]}
STABLE: list[Pattern] = [Sinks(2) | SWA(4), Sinks(2) | SWA(3) | PSA(4), MoBA(4, 2)]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
TOKENS = random_tokens(2, 21)


def model_of(family: str) -> PreTrainedModel:
    model = build(family, FAMILIES[family] | FULL)
    for module in model.modules():
        if isinstance(getattr(module, "sinks", None), torch.nn.Parameter):
            # Far apart, so that a sink of the wrong head shows.
            module.sinks.data = torch.linspace(-1, 4, len(module.sinks))
    return model


@pytest.mark.parametrize("backend", ["reference", "banded", "triton"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@torch.no_grad()
def test_backends_give_the_definitions_logits(family: str, backend: str) -> None:
    model = model_of(family)
    stock = model(TOKENS).logits
    for pattern in [SA(4)] if backend == "triton" else [SA(4), Tail(3) | SWA(4), SA(64)]:
        patch_model(model, pattern, backend=backend)
        patterns, found = layer_patterns(model), model(TOKENS).logits
        assert torch.equal(unpatch_model(model)(TOKENS).logits, stock)
        # An oracle of one row: what is drawn is the same in each.
        expected = torch.cat([oracle_logits(model, row[None], patterns) for row in TOKENS])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
        saturated = pattern.saturated(TOKENS.shape[1])
        assert torch.allclose(found, stock, atol=2e-4) == saturated


@pytest.mark.parametrize("pattern", STABLE, ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_decoding_under_the_pattern_equals_one_pass(family: str, pattern: Pattern) -> None:
    model = patch_model(model_of(family), pattern, decode="pattern")
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    cached = model.generate(TOKENS, attention_mask=mask, **GREEDY)
    assert torch.equal(
        cached, model.generate(TOKENS, attention_mask=mask, use_cache=False, **GREEDY)
    )
    chunked = model.generate(TOKENS, attention_mask=mask, prefill_chunk_size=5, **GREEDY)
    assert torch.equal(chunked, cached)


def test_sinks_learn_under_a_pattern() -> None:
    gradients = []
    for backend in ("reference", "banded"):
        model = patch_model(model_of("gpt_oss"), Sinks(2) | SA(4), backend=backend)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([layer.self_attn.sinks.grad for layer in model.model.layers])
    for dense, banded in zip(*gradients, strict=True):
        assert dense.abs().min() > 1e-6
        torch.testing.assert_close(banded, dense, atol=1e-6, rtol=1e-3)


def test_a_backend_without_it_refuses() -> None:
    model = patch_model(model_of("gpt_oss"), SWA(4), backend="flex")
    says = "backend 'flex' cannot serve .* no learned sinks"
    with torch.no_grad(), pytest.raises(UserError, match=says):
        model(TOKENS)
