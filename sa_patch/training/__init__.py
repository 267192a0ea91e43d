"""HOW a model learns with a sparse pattern: gated SA + SWA, fractional attention, pre-training.

Importing it makes the gated and the fractional models known to transformers'
``AutoModelForCausalLM``.
"""

from sa_patch.training.fractional.attention import fractional_attention
from sa_patch.training.fractional.models import (
    FractionalLlamaConfig,
    FractionalLlamaForCausalLM,
    fractional_model,
)
from sa_patch.training.fractional.module import FractionalAttention
from sa_patch.training.gated.attention import GatedSA
from sa_patch.training.gated.models import (
    GatedLlamaConfig,
    GatedLlamaForCausalLM,
    GatedQwen3Config,
    GatedQwen3ForCausalLM,
    gated_config,
    gated_model,
)

__all__ = [
    "FractionalAttention",
    "FractionalLlamaConfig",
    "FractionalLlamaForCausalLM",
    "GatedLlamaConfig",
    "GatedLlamaForCausalLM",
    "GatedQwen3Config",
    "GatedQwen3ForCausalLM",
    "GatedSA",
    "fractional_attention",
    "fractional_model",
    "gated_config",
    "gated_model",
]
