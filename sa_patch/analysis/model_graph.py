"""A language model's own attention as graphs, under patterns, beside how well it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_patch.analysis.graphs.weight_graph import WeightGraph
from sa_patch.errors import UserError
from sa_patch.patching import patched
from sa_patch.patching.layers import attention_layers, base_model, format_layers
from sa_patch.patching.patch import observe_layers
from sa_patch.patterns import Pattern
from sa_patch.patterns.base import whole_number

# A head's graph is dense and its eigenvalues are all computed: seconds for each at this length.
MAX_TOKENS = 2048


@dataclass(frozen=True)
class HeadGraphs:
    """Of all heads of all measured layers under one pattern, for one text.

    Args:
        layers: int ``[layers]``, their indices.
        gap, path: float64 ``[layers, heads]``: spectral gap and mean shortest path.
        loss: nats per token, predicting each token of the text but the first.
    """

    pattern: Pattern
    layers: np.ndarray
    gap: np.ndarray
    path: np.ndarray
    loss: float


def check_graph_request(
    tokens: int, layers: Sequence[int] | None, sources: int, available: Sequence[int] | None
) -> None:
    """Refuse what cannot be measured, before a model is loaded.

    Args:
        layers: those to measure; None for all.
        available: those of the model; None where they are not known yet.

    Raises:
        UserError: for too short or too long a text, layers that the model does not have, or no
            token to follow paths from.
    """
    whole_number(tokens, "n", 3)
    whole_number(sources, "sources", 1)
    if tokens > MAX_TOKENS:
        raise UserError(
            f"n is {tokens:,}, more than the {MAX_TOKENS:,} of dense graphs; shorten it"
        )
    if available is None or layers is None:
        return
    unknown = [layer for layer in layers if layer not in available]
    if unknown or not layers:
        raise UserError(f"no layers {unknown} to measure; the model has {format_layers(available)}")


def measure_head_graphs(
    model: Any,
    input_ids: Tensor,
    pattern: Pattern,
    layers: Sequence[int] | None = None,
    *,
    sources: int = 64,
    seed: int = 0,
) -> HeadGraphs:
    """Patch all layers of a model with a pattern, read a text, and measure its heads' graphs.

    The model is left as it was.

    Args:
        model: causal language model of transformers.
        input_ids: int64 ``[1, n]``.
        layers: those to measure, all of them by default; all are patched in any case.
        sources: tokens from which paths are followed, drawn at random; all if there are no more.
        seed: of that draw.

    Raises:
        UserError: if the model cannot be patched, or as `check_graph_request`.
    """
    modules = attention_layers(base_model(model))
    n = input_ids.shape[1]
    layers = list(modules) if layers is None else list(layers)
    check_graph_request(n, layers, sources, list(modules))
    drawn = np.random.default_rng(seed).permutation(n)[:sources]
    gaps: dict[int, list[float]] = {}
    paths: dict[int, list[float]] = {}

    def observe(layer: int, q: Tensor, k: Tensor, spans: object) -> None:
        scaling = getattr(modules[layer], "scaling", None) or q.shape[-1] ** -0.5
        for weights in head_weights(q[0].float(), k[0].float(), float(scaling), pattern, layer):
            graph = WeightGraph.of(weights)
            gaps.setdefault(layer, []).append(graph.spectral_gap())
            paths.setdefault(layer, []).append(graph.mean_path(drawn))

    with torch.no_grad(), patched(model, pattern):
        observe_layers(model, observe, layers)
        logits = model(input_ids, use_cache=False).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, input_ids[0, 1:].to(logits.device))
    return HeadGraphs(
        pattern,
        np.array(layers),
        np.array([gaps[layer] for layer in layers]),
        np.array([paths[layer] for layer in layers]),
        float(loss),
    )


def head_weights(
    q: Tensor, k: Tensor, scale: float, pattern: Pattern, layer: int
) -> Iterator[np.ndarray]:
    """Each query head's attention weights ``[n, n]``.

    Args:
        q: float32 ``[q_heads, n, head_dim]``, k: ``[kv_heads, n, head_dim]``.
    """
    heads, n = q.shape[:2]
    group = heads // len(k)
    visible = pattern.visible(
        torch.arange(n, device=q.device), n, layer=layer, heads=heads, q=q, k=k
    )
    for head in range(heads):
        scores = q[head] @ k[head // group].T * scale
        seen = visible[head if len(visible) > 1 else 0]
        yield scores.masked_fill(~seen, -torch.inf).softmax(-1).double().cpu().numpy()
