"""Memory of a model that is no longer needed, given back."""

from __future__ import annotations

import gc


def free_memory() -> None:
    """Collect what nobody refers to any more; on a GPU give it back to others as well."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
