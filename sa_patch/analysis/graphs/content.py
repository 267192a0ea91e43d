"""Queries and keys for patterns that choose by content, where no model gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HEAD_DIM = 64


@dataclass(frozen=True)
class Content:
    """One head's queries and keys of one layer.

    Args:
        q, k: float ``[1, seq_len, head_dim]``.
    """

    q: Tensor
    k: Tensor


def random_content(seq_len: int, layer: int, seed: int) -> Content:
    """Independent standard normal queries and keys: blocks are then chosen as good as at random.

    A model's own choices are more alike from query to query and from layer to layer, so that what
    is measured on these says nothing of a particular model. The global generator is left alone.

    Args:
        seq_len: number of tokens.
        layer, seed: coordinates of the draw.
    """
    generator = torch.Generator().manual_seed((seed << 16) + layer)
    q, k = torch.randn(2, 1, seq_len, HEAD_DIM, generator=generator)
    return Content(q, k)
