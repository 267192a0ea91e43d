"""Checkpoints that are no part of the project: loaded, patched and compared where they lie.

They are read with ``HYPOTHESIS_PROFILE=thorough``, from a folder with a folder for each model, a
GGUF file in it: ``SA_PATCH_TEST_MODELS=~/models``.
"""

import os
import sysconfig
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from sa_patch import Full, patch_model, patched, unpatch_model
from sa_patch.models.embedded import resolve_model
from sa_patch.models.loading import load_pretrained, load_tokenizer
from sa_patch.patching import layer_patterns
from sa_patch.patching.layers import attention_layers
from tests.patching.dense_oracle import attending_densely
from tests.thorough import THOROUGH

CHECKPOINTS = "SA_PATCH_TEST_MODELS"
NAMES = ("qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "gemma-3-270m")
# Long enough that the pattern hides most of the past, and that its tail is not all there is.
TOKENS = 384
COMPOSED = "tail:16+block_topk:4,6,4,16"
LINES = 10_000
# Accents apart from their letters, a ligature, special tokens.
UNUSUAL = "e\u0301 A\u030a \ufb01 \u2126 한국어 🙂\r\n<bos><|im_end|>"


def stdlib() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest) -> str:
    if not THOROUGH:
        pytest.skip("reads a model of hundreds of megabytes; set HYPOTHESIS_PROFILE=thorough")
    folder = Path(os.environ.get(CHECKPOINTS, "models-not-given")).expanduser() / request.param
    if not list(folder.glob("*.gguf")):
        pytest.skip(f"there is no GGUF file in {folder}; put one there, or set {CHECKPOINTS}")
    return str(folder)


def test_ten_thousand_lines_have_the_tokens_of_the_file(checkpoint: str) -> None:
    source = resolve_model(checkpoint)
    stock = AutoTokenizer.from_pretrained(source.pretrained, gguf_file=source.gguf_file)
    own = load_tokenizer(checkpoint, source)
    texts = (line for file in stdlib() for line in file.read_text("utf-8").splitlines(True))
    lines = [
        *islice(texts, LINES - 1),
        "e\u0301 A\u030a \ufb01 \u2126 한국어 🙂\r\n<bos><|im_end|>",
    ]
    assert len(lines) == LINES
    assert own(lines).input_ids == stock(lines).input_ids


@torch.no_grad()
def test_patched_in_full_and_in_part(checkpoint: str) -> None:
    model, tokenizer = load_pretrained(checkpoint)
    text = Path(sysconfig.get_path("stdlib"), "heapq.py").read_text("utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
    stock = model(tokens, use_cache=False).logits
    size = stock.std()
    with patched(model, Full()):
        torch.testing.assert_close(model(tokens, use_cache=False).logits / size, stock / size)
    check_each_layer(model, tokens, stock)
    assert torch.equal(model(tokens, use_cache=False).logits, stock)


def check_each_layer(model: PreTrainedModel, tokens: Tensor, stock: Tensor) -> None:
    """Each layer that the pattern rules gives what the definition gives on the same input."""
    seen: dict[int, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        seen[int(module.layer_idx)] = (given, named, out[0])  # type: ignore[arg-type]

    patch_model(model, COMPOSED)
    patterns = layer_patterns(model)
    modules = attention_layers(model)
    hooks = [each.register_forward_hook(keep, with_kwargs=True) for each in modules.values()]
    sparse = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    unpatch_model(model)
    ruled = [layer for layer, pattern in patterns.items() if pattern is not None]
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(patterns)
    assert ruled == [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    with attending_densely(model, patterns):
        for layer in ruled:
            given, named, found = seen[layer]
            expected = modules[layer](*given, **named)[0]
            scale = expected.std()
            torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=1e-4)
    assert (sparse - stock).abs().max() > 1e-2 * stock.std(), "the pattern hides something here"
