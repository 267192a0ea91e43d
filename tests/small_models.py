"""Tiny random causal language models of every family that must be patchable, built in milliseconds.

Weights are drawn wide (`initializer_range`), so that attention is far from uniform and a wrong
visible set shows in the logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 64
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 3  # ids from here on are ordinary tokens

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}

_FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_hidden_layers": 3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 1}),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 8, "sliding_window": None}),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
MOE_FAMILIES = frozenset({"qwen3_moe"})


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of `family`; `overrides` go over the defaults."""
    config_class, _, own = _FAMILIES[family]
    config: PreTrainedConfig = config_class(**(_COMMON | own | overrides))
    return config


def build(family: str, config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of `config` in evaluation mode, float32; leaves the global random state as it was."""
    _, model_class, _ = _FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Callable[[PreTrainedConfig], PreTrainedModel] = model_class
        return make(config).to(torch.float32).eval()


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `family`, one of FAMILIES, with seeded random weights."""
    return build(family, tiny_config(family, **overrides), seed)


def random_tokens(batch: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Ordinary token ids, never padding or end of text. [batch, seq_len]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCAB_SIZE, (batch, seq_len), generator=generator)
