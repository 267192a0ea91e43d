"""WHERE is a pattern attached: Hugging Face models, their caches and masks."""

from sa_patch.patching.implementations import register_from_environment, register_implementation
from sa_patch.patching.layers import attention_layers, format_layers, parse_layers
from sa_patch.patching.patch import (
    check_decode,
    layer_branches,
    layer_patterns,
    observe_layers,
    patch_model,
    patched,
    stock_patterns,
    unpatch_model,
)
from sa_patch.patching.schedule import Layers, Schedule

__all__ = [
    "Layers",
    "Schedule",
    "attention_layers",
    "check_decode",
    "format_layers",
    "layer_branches",
    "layer_patterns",
    "observe_layers",
    "parse_layers",
    "patch_model",
    "patched",
    "register_from_environment",
    "register_implementation",
    "stock_patterns",
    "unpatch_model",
]
