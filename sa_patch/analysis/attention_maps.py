"""What a head of a model attends to, and what patterns leave of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.patching import patched
from sa_patch.patching.layers import attention_layers, base_model
from sa_patch.patching.patch import observe_layers
from sa_patch.patterns import Full, Pattern

# A map holds n x n weights for each pattern, and more rows than this are not told apart by eye.
MAX_TOKENS = 2048


@dataclass(frozen=True)
class AttentionMap:
    """One head's attention weights under a pattern.

    Args:
        visible: bool ``[n, n]``.
        weights: float32 ``[n, n]``; rows sum to 1, 0 where not visible.
        kept: mean over queries of the share of full attention's weight that falls on visible keys.
        mean_keys: visible keys per query.
    """

    pattern: Pattern
    visible: Tensor
    weights: Tensor
    kept: float
    mean_keys: float


@dataclass(frozen=True)
class HeadInputs:
    """What one layer's attention gets for a prompt, under the model's stock attention.

    Args:
        q: float32 ``[q_heads, n, head_dim]``, k: ``[kv_heads, n, head_dim]``; positions applied.
        scale: of the dot products.
    """

    q: Tensor
    k: Tensor
    scale: float


def check_tokens(count: int) -> None:
    """Refuse a prompt of which no map can be drawn, before a model is loaded.

    Raises:
        UserError: unless it has from 2 to `MAX_TOKENS` tokens.
    """
    if count < 2:
        raise UserError(f"a map needs at least 2 tokens, and the prompt has {count}; lengthen it")
    if count > MAX_TOKENS:
        raise UserError(
            f"the prompt has {count:,} tokens, more than the {MAX_TOKENS:,} of a map; shorten it"
        )


def head_inputs(model: Any, input_ids: Tensor, layer: int) -> HeadInputs:
    """Run a model over a prompt and keep one layer's queries and keys.

    Every other layer keeps its stock attention and this one attends fully, so that these are what
    the untouched model computes. The model is left as it was.

    Args:
        model: causal language model of transformers.
        input_ids: int64 ``[1, n]``.
        layer: index of an attention layer.

    Raises:
        UserError: if the model cannot be patched, the layer is none of its, or the prompt has
            fewer than 2 or more than `MAX_TOKENS` tokens.
    """
    check_tokens(input_ids.shape[1])
    modules = attention_layers(base_model(model))
    if layer not in modules:
        raise UserError(f"layer {layer} has no attention to show; this model's: {list(modules)}")
    caught: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad(), patched(model, Full(), layers=[layer]):
        observe_layers(model, lambda _, q, k, spans: caught.append((q[0], k[0])), [layer])
        model(input_ids, use_cache=False)
    q, k = (tensor.float().cpu() for tensor in caught[0])
    scaling = getattr(modules[layer], "scaling", None)
    return HeadInputs(q, k, q.shape[-1] ** -0.5 if scaling is None else float(scaling))


def attention_maps(
    inputs: HeadInputs, patterns: Sequence[Pattern], layer: int, head: int
) -> list[AttentionMap]:
    """One head's weights under each pattern, all from the same queries and keys.

    A pattern masks the scores before the softmax, as in a patched layer; earlier layers are those
    of the stock model, so that panels differ by this layer's mask alone.

    Args:
        layer, head: for patterns that differ by layer, or choose by the head's queries.
    """
    heads, n = inputs.q.shape[:2]
    group = heads // inputs.k.shape[0]
    scores = inputs.q[head] @ inputs.k[head // group].T * inputs.scale
    past = torch.ones(n, n, dtype=torch.bool).tril()
    full = scores.masked_fill(~past, -torch.inf).softmax(-1)
    maps = []
    for pattern in patterns:
        seen = pattern.visible(torch.arange(n), n, layer=layer, heads=heads, q=inputs.q, k=inputs.k)
        visible = seen[head if len(seen) > 1 else 0]
        # A row without keys would be NaN; no pattern has one.
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        kept = float((full * visible).sum(-1).mean())
        maps.append(AttentionMap(pattern, visible, weights, kept, float(visible.sum() / n)))
    return maps
