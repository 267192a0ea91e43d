"""What a block of keys is judged by: its mean."""

from __future__ import annotations

import torch
from torch import Tensor


def block_means(k: Tensor, block_size: int) -> Tensor:
    """Mean key of every complete block, in fp32.

    Args:
        k: ``[..., seq_len, head_dim]``.

    Returns:
        fp32 ``[..., seq_len // block_size, head_dim]``.
    """
    complete = k.shape[-2] // block_size
    blocks = k[..., : complete * block_size, :].unflatten(-2, (complete, block_size))
    return blocks.mean(-2, dtype=torch.float32)
