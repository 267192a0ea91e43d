"""Small models of the families of transformers: of each, how its configuration differs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Latent attention: values are narrower than keys.
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
_LINEAR: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_INDEXER: dict[str, Any] = {
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
_MIXED: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _EXPERTS
    | {"head_dim": 8, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": _EXPERTS | _LATENT,
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": _MIXED,
    "cohere2_moe": {},
    "ctrl": {},
    "cwm": {},
    "deepseek_v2": _EXPERTS | _LATENT,
    "deepseek_v3": _EXPERTS | _LATENT,
    "diffllama": {},
    "dots1": _EXPERTS,
    "ernie4_5": {},
    "exaone4": {},
    "exaone_moe": _EXPERTS | {"head_dim": 8},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "head_dim": 8,
    },
    "flex_olmo": {},
    "flint": {},
    "gemma": {"head_dim": 8},
    "gemma2": _MIXED | {"attn_logit_softcapping": 1.0},
    "gemma3_text": _MIXED,
    "gemma4_unified_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": _EXPERTS | {"head_dim": 8},
    "glm4_moe_lite": _EXPERTS | _LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": _MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": _MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    "granitemoeshared": {},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hyperclovax": {},
    "jais2": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "jetmoe": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "llama": {},
    "llama4_text": {"head_dim": 8},
    "minicpm3": _LATENT,
    "minimax": {},
    "minimax_m2": {},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {},
    "modernbert-decoder": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": _MAMBA
    | {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "head_dim": 8,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": _MIXED,
    "olmo_hybrid": {},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": _EXPERTS,
    "qwen3": {"head_dim": 16},
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _EXPERTS | {"head_dim": 8},
    "qwen3_next": _EXPERTS | _LINEAR,
    "seed_oss": {},
    "smollm3": {},
    "solar_open": _EXPERTS,
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"attn_logit_softcapping": 1.0},
    "youtu": _LATENT,
    "zaya": _MIXED
    | {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "moe_intermediate_size": 16,
        "num_experts": 2,
        "router_hidden_size": 16,
    },
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "does not go through transformers' attention interface"),
    "codegen": ({"rotary_dim": 8}, "does not go through transformers' attention interface"),
    "falcon": ({}, "does not go through transformers' attention interface"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "does not go through transformers' attention interface",
    ),
    "gptj": ({"rotary_dim": 8}, "does not go through transformers' attention interface"),
    "mpt": ({}, "does not go through transformers' attention interface"),
    "openai-gpt": ({}, "does not go through transformers' attention interface"),
    "falcon_mamba": ({}, "has no causal self-attention layer to patch"),
    "mamba": ({}, "has no causal self-attention layer to patch"),
    "bert": ({}, "has no causal self-attention layer to patch"),
    "hrm_text": ({}, "has several attention modules in layer 0"),
    "axk2": (_EXPERTS | _LATENT | _INDEXER, "chooses keys itself, by the indexer of layer 0"),
    "deepseek_v32": (_EXPERTS | _LATENT | _INDEXER, "the indexer of layer 0"),
    "deepseek_v4": (_EXPERTS | {"head_dim": 16}, "the compressor of layer 0"),
    "dots3_note_text": (_EXPERTS | _LATENT | _INDEXER, "the indexer of layer 0"),
    "glm_moe_dsa": (_EXPERTS | _LATENT | _INDEXER, "the indexer of layer 0"),
    "hy_v4": (_EXPERTS | _LATENT | _INDEXER, "the indexer of layer 0"),
    "minimax_m3_vl_text": (
        _EXPERTS
        | _INDEXER
        | {"head_dim": 8, "layer_types": ["full_attention", "minimax_m3_sparse"]},
        "the indexer of layer 1",
    ),
    "qwen4_exp_text": (
        _EXPERTS
        | _LINEAR
        | {
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        },
        "the indexer of layer 1",
    ),
}


def build(family: str, own: dict[str, Any]) -> PreTrainedModel:
    """A model of a family in float32, its weights drawn by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CONFIG_MAPPING[family](**(COMMON | own))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.to(torch.float32).eval()
