"""Windows and chunks that models have of their own, also where no `layer_types` name them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sa_patch import SWA, Full, patch_model, unpatch_model
from sa_patch.errors import UserError
from sa_patch.evaluation.metering.pattern_meter import HeadShape, PatternMeter
from sa_patch.kernels.visited_keys import visited_keys
from sa_patch.patching import layer_patterns, stock_patterns
from sa_patch.patching.layers import OwnChunk
from sa_patch.patterns import Pattern
from tests.patching.dense_oracle import oracle_logits
from tests.patching.families import FAMILIES, build
from tests.small_models import random_tokens

SIZE = 8
TOKENS = random_tokens(2, 20)
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
SLIDING: dict[str, Any] = {"sliding_window": SIZE}
# All layers of these slide one window, and they have no `layer_types`.
EVERYWHERE = ("mistral", "mixtral", "phi3", "starcoder2")
TWICE: list[Pattern] = [SWA(SIZE), SWA(SIZE)]
SHOWN: list[tuple[str, dict[str, Any], list[Pattern]]] = [
    *((family, SLIDING, TWICE) for family in EVERYWHERE),
    ("qwen3_moe", SLIDING | {"use_sliding_window": True}, TWICE),
    ("qwen3_moe", SLIDING | {"use_sliding_window": False}, [Full(), Full()]),
    ("qwen2", SLIDING | {"use_sliding_window": True, "max_window_layers": 1}, [Full(), SWA(SIZE)]),
    ("gemma3_text", SLIDING, [SWA(SIZE), Full()]),
    ("zaya", SLIDING, [SWA(SIZE), Full()]),
    # A conversion left it in a configuration that knows nothing of windows.
    ("llama", SLIDING, [Full(), Full()]),
    ("llama4_text", {"attention_chunk_size": SIZE}, [OwnChunk(SIZE), OwnChunk(SIZE)]),
    (
        "llama4_text",
        {"attention_chunk_size": SIZE, "no_rope_layer_interval": 2},
        [OwnChunk(SIZE), Full()],
    ),
]


def windowed(family: str, own: dict[str, Any]) -> PreTrainedModel:
    return build(family, FAMILIES[family] | own)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize(("family", "own", "shown"), SHOWN, ids=lambda value: str(value)[:40])
def test_stock_patterns_are_what_the_model_shows(
    family: str, own: dict[str, Any], shown: list[Pattern]
) -> None:
    model = windowed(family, own)
    stock = logits(model)
    patterns = stock_patterns(model)
    assert patterns == dict(enumerate(shown))
    torch.testing.assert_close(oracle_logits(model, TOKENS, patterns), stock, **TOLERANCE)


# MiniMax slides the layers that its `layer_types` call full.
@pytest.mark.parametrize("family", [*EVERYWHERE, "minimax"])
def test_where_every_layer_slides_patterns_serve_the_window_and_refuse_more(family: str) -> None:
    model, within = windowed(family, SLIDING), TOKENS[:, :SIZE]
    short, long = logits(model, within), logits(model)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    written = model.generate(within, **greedy)
    for pattern in (SWA(4096), Full()):
        patch_model(model, pattern)
        torch.testing.assert_close(logits(model, within), short, **TOLERANCE)
        # Generated tokens see the model's own window, also behind it.
        assert torch.equal(model.generate(within, **greedy), written)
        with pytest.raises(UserError, match=r"own sliding window of 8 .*no attention layer .*None"):
            logits(model)
    patch_model(model, SWA(3))
    patterns = layer_patterns(model)
    found = logits(model, within)
    assert (found - short).abs().max() > 0.1
    torch.testing.assert_close(found, oracle_logits(model, within, patterns), **TOLERANCE)
    # What the sentence offers.
    model.config.sliding_window = None
    found = logits(model)
    torch.testing.assert_close(found, oracle_logits(model, TOKENS, patterns), **TOLERANCE)
    model.config.sliding_window = SIZE
    assert torch.equal(logits(unpatch_model(model)), long)


def test_chunks_are_refused_by_their_name_and_full_layers_are_left() -> None:
    chunked = windowed("llama4_text", {"attention_chunk_size": SIZE})
    with pytest.raises(UserError, match="own attention chunk of 8 .*give shorter sequences$"):
        logits(patch_model(chunked, SWA(4)))
    mixed = windowed("llama4_text", {"attention_chunk_size": SIZE, "no_rope_layer_interval": 2})
    patch_model(mixed, SWA(4))
    patterns = layer_patterns(mixed)
    assert patterns == {0: None, 1: SWA(4)}
    torch.testing.assert_close(logits(mixed), oracle_logits(mixed, TOKENS, patterns), **TOLERANCE)
    with pytest.raises(UserError, match="own attention chunk of 8 .*leave its layers out"):
        logits(patch_model(mixed, SWA(4), layers=[0]))


def test_a_chunk_is_counted_as_what_it_shows() -> None:
    chunk, counts = OwnChunk(SIZE), [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
    assert chunk.visible(torch.arange(12), 12).sum(-1).tolist() == [counts]
    assert chunk.count_visible(12).tolist() == [counts]
    assert chunk.saturated(SIZE) and not chunk.saturated(SIZE + 1)
    # A tile of 64 queries reads no block of 16 but those of its own 64 keys.
    assert visited_keys(OwnChunk(64), 256, heads=4, kv_heads=2).keys[16] == 64
    model = windowed("llama4_text", {"attention_chunk_size": SIZE})
    meter = PatternMeter(dict.fromkeys(range(2)), HeadShape.of(model.config), stock_patterns(model))
    meter.add([12])
    summary = meter.summary()
    assert summary["mean_keys_per_query"] == pytest.approx(sum(counts) / 12)
    assert summary["attention_flops"] == summary["full_attention_flops"]
    assert summary["visited_keys"] == summary["full_visited_keys"]
