"""Models that see images: their text layers are patched where masks are causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from sa_patch import Full, patch_model, patched, unpatch_model
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns

IMAGE = 63
_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
_EYES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}


def tokens_with_image() -> Tensor:
    tokens = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    tokens[0, 5], tokens[0, 6:10], tokens[0, 10] = 62, IMAGE, 61
    return tokens


def seeded(build: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = build(config).eval()
    return model


def qwen() -> tuple[PreTrainedModel, dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen3VLConfig(
        text_config=_TEXT | {"rope_parameters": rope},
        vision_config=_EYES
        | {
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=IMAGE,
        video_token_id=60,
        vision_start_token_id=62,
        vision_end_token_id=61,
    )
    tokens = tokens_with_image()
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    image = {
        "input_ids": tokens,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == IMAGE).long(),
    }
    return seeded(Qwen3VLForConditionalGeneration, config), image


def gemma() -> tuple[PreTrainedModel, dict[str, Any]]:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3Config(
        text_config=_TEXT | {"sliding_window": 64, "layer_types": kinds},
        vision_config=_EYES | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=62,
        eoi_token_index=61,
    )
    tokens = tokens_with_image()
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    types = (tokens == IMAGE).long()
    image = {"input_ids": tokens, "pixel_values": pixels, "token_type_ids": types}
    return seeded(Gemma3ForConditionalGeneration, config), image


@torch.no_grad()
def test_image_tokens_of_a_causal_model_are_tokens_of_the_prompt() -> None:
    model, image = qwen()
    stock = model(**image).logits
    with patched(model, Full()):
        torch.testing.assert_close(model(**image).logits, stock)
    patch_model(model, "sinks:2+swa:4")
    assert list(layer_patterns(model)) == [0, 1]
    sparse = model(**image).logits
    assert (sparse - stock)[:, 12:].abs().max() > 1e-2
    torch.testing.assert_close(model(**image, use_cache=False).logits, sparse)
    # Another image changes nothing before it.
    image["pixel_values"] = image["pixel_values"] + 1
    other = model(**image).logits
    assert torch.equal(other[:, :6], sparse[:, :6])
    assert (other - sparse)[:, 6:].abs().max() > 1e-3
    image["pixel_values"] = image["pixel_values"] - 1
    assert model.config.vision_config._attn_implementation == "sdpa"
    unpatch_model(model)
    torch.testing.assert_close(model(**image).logits, stock)


@torch.no_grad()
def test_images_that_are_seen_both_ways_are_refused_and_text_is_not() -> None:
    model, image = gemma()
    stock = model(**image).logits
    patch_model(model, "swa:4")
    with pytest.raises(UserError, match="image tokens that see each other both ways"):
        model(**image)
    text = image["input_ids"].clamp(max=59)
    alone = model(text).logits
    assert list(layer_patterns(model).values()).count(None) == 1
    assert not torch.allclose(alone, unpatch_model(model)(text).logits, atol=1e-3)
    assert torch.equal(model(**image).logits, stock)
