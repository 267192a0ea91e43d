"""Which heads retrieve, without training: those that look at the answer that is asked for.

DuoAttention (2410.10819) trains a gate for every head. Here nothing is trained, and the score is
ours, close to the copy score that names retrieval heads (2404.15574): how much attention the query
that must name a token of the answer pays to the place where it is hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.kernels import Spans
from sa_patch.patching import observe_layers, patched
from sa_patch.patching.layers import default_layers
from sa_patch.patterns import ByHead, Full, Pattern

Scores = Mapping[int, Tensor]
"""From 0 to 1, of the KV heads of every layer: float64 ``[kv_heads]``."""


def retrieval_scores(model: Any, documents: Sequence[Document]) -> Scores:
    """Attention weight, under full attention, from the queries that name answers to these.

    A mean over the tokens of all answers; of the query heads that share a KV head the largest
    counts. Layers are those that `patch_model` would patch.

    Args:
        documents: of the kind "recall".

    Raises:
        UserError: if none hides what it asks for.
    """
    layers = sorted(default_layers(model))
    places = [hidden_answers(document) for document in documents]
    answers = sum(len(queries) for queries, _ in places)
    if not answers:
        raise UserError("no text hides the answers that it asks for; give a larger --n")
    sums: dict[int, Tensor] = {}
    for document, own in zip(documents, places, strict=True):

        def look(layer: int, q: Tensor, k: Tensor, spans: Spans, at: Any = own) -> None:
            found = _weights(q[0], k[0], *at).double().sum(-1).cpu()
            sums[layer] = sums[layer] + found if layer in sums else found

        with torch.inference_mode(), patched(model, Full(), layers=layers):
            observe_layers(model, look, layers)
            tokens = torch.tensor([document.tokens], device=model.device)
            model(tokens, use_cache=False, logits_to_keep=1)
    return {layer: (total / answers).amax(1) for layer, total in sums.items()}


def hidden_answers(document: Document) -> tuple[list[int], list[int]]:
    """The queries that name the tokens of answers, and where these tokens are hidden."""
    counted, tokens = document.counted, document.tokens
    begins = [place for place in counted if place - 1 not in counted]
    queries: list[int] = []
    keys: list[int] = []
    for begin in begins:
        end = next(place for place in range(begin, len(tokens) + 1) if place not in counted)
        size = end - begin
        hidden = next(i for i in range(begin + 1) if tokens[i : i + size] == tokens[begin:end])
        if hidden < begin:
            queries += range(begin - 1, end - 1)
            keys += range(hidden, hidden + size)
    return queries, keys


def _weights(q: Tensor, k: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """Attention weights of queries at keys, one by one: ``[kv_heads, group, len(queries)]``.

    Args:
        q: ``[q_heads, n, head_dim]``.
        k: ``[kv_heads, n, head_dim]``.
    """
    at = torch.tensor(queries, dtype=torch.int64, device=q.device)
    grouped = q[:, at].unflatten(0, (len(k), -1)).float() * q.shape[-1] ** -0.5
    scores = grouped @ k[:, None].float().mT
    later = torch.arange(k.shape[1], device=q.device) > at[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return weights[..., torch.arange(len(at)), keys]


def full_heads(scores: Scores, count: int) -> list[tuple[int, int]]:
    """Layer and KV head of the `count` highest scores, best first; of equal ones the first.

    Raises:
        UserError: if there are not so many.
    """
    heads = [(layer, head) for layer in sorted(scores) for head in range(len(scores[layer]))]
    if not 0 < count < len(heads):
        raise UserError(
            f"--full-heads must be from 1 to {len(heads) - 1}, as the model has {len(heads)} KV "
            f"heads in the layers that can be sparse; got {count}"
        )
    return sorted(heads, key=lambda place: -float(scores[place[0]][place[1]]))[:count]


def layers_by_head(
    scores: Scores, full: Sequence[tuple[int, int]], pattern: Pattern
) -> dict[int, Pattern]:
    """The pattern of every layer: `full` heads see everything, all others what `pattern` shows."""
    found: dict[int, Pattern] = {}
    for layer, own in sorted(scores.items()):
        each = tuple(Full() if (layer, head) in full else pattern for head in range(len(own)))
        found[layer] = each[0] if len(set(each)) == 1 else ByHead(each)
    return found
