"""Patched models under `torch.autocast`, as `Trainer` runs them with ``bf16=True``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sa_patch import PSA, SA, BlockTopK, MoBA, patch_model
from sa_patch.kernels import Spans
from sa_patch.patching.patch import observe_layers
from sa_patch.patterns import Pattern
from tests.small_models import random_tokens, tiny_model

PATTERNS = [SA(4), PSA(4), MoBA(4, 2), BlockTopK(2, 2, 2, 2)]
TOKENS = random_tokens(2, 40)
MASK = torch.ones_like(TOKENS).index_fill_(1, torch.arange(6), 0)
MASK[1] = 1


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "banded"])
def test_models_train(pattern: Pattern, backend: str) -> None:
    model = patch_model(tiny_model("llama", num_hidden_layers=1), pattern, backend=backend)
    exact = model(TOKENS, attention_mask=MASK, labels=TOKENS).loss
    with autocast():
        loss = model(TOKENS, attention_mask=MASK, labels=TOKENS).loss
    loss.backward()
    assert (loss - exact).abs() < 0.05
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("pattern", [SA(4), MoBA(4, 2)], ids=str)
def test_compiled_models_do_what_uncompiled_ones_do(pattern: Pattern) -> None:
    model = patch_model(tiny_model("llama", num_hidden_layers=1), pattern)
    logits, gradients = [], []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with autocast():
            out = run(TOKENS, attention_mask=MASK, labels=TOKENS)
        out.loss.backward()
        assert out.logits.dtype == torch.bfloat16
        logits.append(out.logits[MASK.bool()])
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*logits)
    for compiled, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(compiled, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("pattern", PATTERNS[2:], ids=str)
@torch.no_grad()
def test_observers_are_shown_what_chooses(pattern: Pattern) -> None:
    seen: list[Tensor] = []

    def observe(layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
        assert not torch.is_autocast_enabled("cpu")
        assert q.dtype == k.dtype == torch.bfloat16
        places, n = torch.arange(k.shape[2]), k.shape[2]
        seen.append(pattern.visible(places, n, layer=layer, heads=q.shape[1], q=q[0], k=k[0]))

    model = patch_model(tiny_model("llama", num_hidden_layers=1), pattern)
    observe_layers(model, observe, [0])
    with autocast():
        model(TOKENS)
    assert len(seen) == 1
