"""Attention of a whole model by definition: masks from `pattern.visible`, plain softmax in float32.

A second implementation for transformers' interface, which shares no code with sa_patch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from sa_patch.patterns import Pattern

_NAME = "dense_oracle"
_PATTERNS: dict[int, Pattern | None] = {}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    heads, n, layer = query.shape[1], query.shape[2], int(module.layer_idx)  # type: ignore[arg-type]
    pattern = _PATTERNS[layer]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = query @ k.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if pattern is None:
        scores = scores + attention_mask
    else:
        for row in range(len(query)):
            seen = pattern.visible(
                torch.arange(n), n, layer=layer, heads=heads, q=query[row], k=key[row]
            )
            scores[row] = scores[row].masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(len(scores), -1, n, 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, eager_mask)


@contextmanager
def attending_densely(
    model: PreTrainedModel, patterns: Mapping[int, Pattern | None]
) -> Iterator[None]:
    """Give a model's layers these patterns for a while, None for the model's own mask."""
    stock = model.config._attn_implementation
    _PATTERNS.update(patterns)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(stock)


@torch.no_grad()
def oracle_logits(
    model: PreTrainedModel, tokens: Tensor, patterns: Mapping[int, Pattern | None]
) -> Tensor:
    """Logits of a model whose layers have these patterns, None for the model's own mask.

    Args:
        tokens: ``[batch, n]``, without padding.
    """
    with attending_densely(model, patterns):
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits
