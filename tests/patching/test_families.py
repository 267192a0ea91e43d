"""Every family of transformers that can be built small, under every kind of pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sa_patch import PSA, SA, SWA, BlockTopK, MoBA, Sinks, Tail, patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns
from sa_patch.patterns import Pattern
from tests.block_walk import walked_lists
from tests.patching.dense_oracle import oracle_logits
from tests.patching.families import FAMILIES, REFUSED, build
from tests.small_models import random_tokens
from tests.thorough import unless_thorough

__all__ = ["walked_lists"]

PATTERNS: list[Pattern] = [
    SWA(4),
    SA(4),
    Sinks(2) | SWA(3) | PSA(4),
    MoBA(4, 2),
    BlockTopK(2, 2, 2, 2),
]
TOKENS = random_tokens(1, 23)

# Latent attention: values narrower than keys. Up to 256 keys `auto` may take the dense mask.
LATENT = ["deepseek_v2", "deepseek_v3", "minicpm3"]
LONG = random_tokens(1, 261)
LONG_BACKENDS = ["auto", "reference", "banded", "flex", "triton"]
# Triton's interpreter is slow, and all families are one to it.
LONG_RUNS = [
    (family, backend)
    for family in LATENT
    for backend in LONG_BACKENDS
    if backend != "triton" or family in unless_thorough(LATENT[:1], LATENT)
]
LONG_PATTERNS: list[Pattern] = [
    SWA(32),
    SA(16),
    PSA(16),
    MoBA(16, 3),
    BlockTopK(4, 4, 4, 8),
    Tail(8) | Sinks(4) | SWA(16),
]


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", unless_thorough(list(FAMILIES)[::2], list(FAMILIES)))
def test_logits_are_those_of_the_definition(family: str) -> None:
    model = build(family, FAMILIES[family])
    stock = logits(model)
    size = float(stock.std())
    for pattern in PATTERNS:
        patch_model(model, pattern)
        patterns = layer_patterns(model)
        found = logits(model)
        assert torch.equal(logits(unpatch_model(model)), stock)
        types = getattr(model.config, "layer_types", None) or []
        full = {i for i, kind in enumerate(types) if kind in ("full_attention", "hybrid")}
        if full:
            assert full == {i for i, own in patterns.items() if own is not None}
        expected = oracle_logits(model, TOKENS, patterns)
        torch.testing.assert_close(found / size, expected / size, atol=1e-4, rtol=1e-4)
        assert (found - stock).abs().max() > 1e-2 * size, "the pattern hides something here"
    assert torch.equal(logits(model), stock)


@pytest.mark.usefixtures("walked_lists")
@pytest.mark.parametrize(("family", "backend"), LONG_RUNS)
def test_long_prompts_of_latent_attention(family: str, backend: str) -> None:
    model = build(family, FAMILIES[family] | {"num_hidden_layers": 1})
    stock = logits(model, LONG)
    size = float(stock.std())
    for pattern in LONG_PATTERNS:
        patch_model(model, pattern, backend=backend)
        own = layer_patterns(model)
        found = logits(model, LONG)
        expected = oracle_logits(unpatch_model(model), LONG, own)
        torch.testing.assert_close(found / size, expected / size, atol=1e-4, rtol=1e-4)
        assert (found - stock).abs().max() > 1e-2 * size, "the pattern hides something here"


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_patched_says_why_and_stays_as_it_was(family: str) -> None:
    own, says = REFUSED[family]
    model = build(family, own)
    stock = logits(model)
    with pytest.raises(UserError, match=says):
        patch_model(model, SWA(4))
    assert torch.equal(logits(model), stock)
