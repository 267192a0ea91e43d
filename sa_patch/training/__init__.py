"""HOW a model learns with a sparse pattern: gated SA + SWA, and pre-training from scratch.

Importing it makes the gated models known to transformers' ``AutoModelForCausalLM``.
"""

from sa_patch.training.gated_attention import GatedSA
from sa_patch.training.gated_models import (
    GatedLlamaConfig,
    GatedLlamaForCausalLM,
    GatedQwen3Config,
    GatedQwen3ForCausalLM,
    gated_config,
    gated_model,
)

__all__ = [
    "GatedLlamaConfig",
    "GatedLlamaForCausalLM",
    "GatedQwen3Config",
    "GatedQwen3ForCausalLM",
    "GatedSA",
    "gated_config",
    "gated_model",
]
