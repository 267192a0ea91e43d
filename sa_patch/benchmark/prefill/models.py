"""The models whose prefill is measured: Qwen3 at its published sizes with random weights, or any.

Speed and memory do not depend on what weights hold, so that nothing has to be downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sa_patch.models.embedded import resolve_model
from sa_patch.models.loading import load_causal_lm

_COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
# As the models' authors publish them (Qwen/Qwen3-8B and Qwen/Qwen3-30B-A3B).
_PUBLISHED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen3-8b": (
        Qwen3Config,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
    ),
}
PUBLISHED = tuple(_PUBLISHED)
# Rehearsals: the same code on tensors that a CPU multiplies at once.
_SHRUNKEN: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_SHRUNKEN_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def published_config(name: str, *, small: bool = False) -> PreTrainedConfig:
    """The configuration of one of `PUBLISHED`.

    Args:
        small: the same architecture, shrunk until it is good for nothing but a rehearsal.
    """
    config_class, own = _PUBLISHED[name]
    values = _COMMON | own
    if small:
        values |= _SHRUNKEN | (_SHRUNKEN_EXPERTS if "num_experts" in own else {})
    return config_class(**values)


def check_model(name: str) -> None:
    """Raise `UserError` for a name that no model can have; nothing is loaded."""
    if name not in PUBLISHED:
        resolve_model(name)


def make_model(name: str, *, device: str, dtype: str, small: bool = False) -> PreTrainedModel:
    """The model, ready to be timed on `device`.

    Args:
        name: one of `PUBLISHED`, built there with random weights from seed 0; or what
            `load_pretrained` takes, loaded with its own.
        dtype: of weights and activations.
        small: of `published_config`.

    Raises:
        UserError: if a model cannot be loaded.
    """
    if name not in PUBLISHED:
        loaded: PreTrainedModel = load_causal_lm(name, resolve_model(name), dtype)
        return loaded.to(device).eval()
    torch.manual_seed(0)
    with torch.device(device):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            published_config(name, small=small),
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
        )
    return built.eval()
