"""Sparse prefill attention for pretrained Hugging Face language models, without training.

Everything here is imported on first use, so that ``import sa_patch`` and the command line start
without loading torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sa_patch.kernels import sparse_attention
    from sa_patch.patching import patch_model, patched, register_implementation, unpatch_model
    from sa_patch.patterns import PSA, SA, SWA, BlockTopK, Full, MoBA, Sinks, Tail

__version__ = "0.1.0"

__all__ = [
    "PSA",
    "SA",
    "SWA",
    "BlockTopK",
    "Full",
    "MoBA",
    "Sinks",
    "Tail",
    "patch_model",
    "patched",
    "register_implementation",
    "sparse_attention",
    "unpatch_model",
]

_HOME = {
    "PSA": "sa_patch.patterns",
    "SA": "sa_patch.patterns",
    "SWA": "sa_patch.patterns",
    "BlockTopK": "sa_patch.patterns",
    "Full": "sa_patch.patterns",
    "MoBA": "sa_patch.patterns",
    "Sinks": "sa_patch.patterns",
    "Tail": "sa_patch.patterns",
    "sparse_attention": "sa_patch.kernels",
    "patch_model": "sa_patch.patching",
    "patched": "sa_patch.patching",
    "register_implementation": "sa_patch.patching",
    "unpatch_model": "sa_patch.patching",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether the ``sa-patch`` command is starting, which reads the variable where it reports."""
    return not sys.argv or Path(sys.argv[0]).name in ("sa-patch", "-m")


if os.environ.get("SA_PATCH_IMPLEMENTATIONS") and not _is_command():
    importlib.import_module("sa_patch.patching").register_from_environment()
