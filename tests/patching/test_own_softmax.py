"""Models that change the softmax itself: a sparse layer must refuse, not ignore it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)

from sa_patch import SWA, Full, patch_model, unpatch_model
from sa_patch.errors import UserError
from tests.small_models import random_tokens

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 32,
}


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**COMMON)).eval()


def gpt_oss() -> PreTrainedModel:
    config = GptOssConfig(**COMMON, num_local_experts=2, num_experts_per_tok=1)
    return GptOssForCausalLM(config).eval()


@pytest.mark.parametrize(("build", "argument"), [(gemma2, "softcap"), (gpt_oss, "s_aux")])
@pytest.mark.parametrize("pattern", [Full(), SWA(4)])
def test_a_softmax_of_the_models_own_is_refused(
    build: type[PreTrainedModel], argument: str, pattern: Full | SWA
) -> None:
    model = build()
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        before = model(tokens).logits
        patch_model(model, pattern)
        with pytest.raises(UserError, match=f"changes its softmax by '{argument}'"):
            model(tokens)
        assert torch.equal(unpatch_model(model)(tokens).logits, before)
