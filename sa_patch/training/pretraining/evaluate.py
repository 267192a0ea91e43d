"""What a trained model is measured by: held-out perplexity, recall by distance, gates by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sa_patch.training.gated.models import gate_layers

# Sequences that the gates' statistics are taken from, at most.
_GATE_SEQUENCES = 16


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def validation_loss(model: Any, rows: Tensor, batch: int, device: torch.device) -> Tensor:
    """Summed negative log-likelihood in nats, and how many tokens it is of: float64 ``[2]``.

    Args:
        rows: ``[sequences, n]``, none at all where a process has no share; the first token of each
            is not scored.
    """
    total = torch.zeros(2, dtype=torch.float64)
    with evaluating(model):
        for part in _parts(rows, batch):
            tokens = part.to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            total += torch.tensor([float(loss), tokens[:, 1:].numel()], dtype=torch.float64)
    return total


def _parts(rows: Tensor, batch: int) -> tuple[Tensor, ...]:
    # Of no rows `split` makes one part, which models do not take.
    return rows.split(batch) if len(rows) else ()


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; infinite where it is beyond float64."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def recall_hits(
    model: Any, rows: Tensor, distance: Tensor, window: int, batch: int, device: torch.device
) -> Tensor:
    """Right answers and questions of every bucket of distance: float64 ``[buckets, 2]``.

    An answer is right if the most likely token of the whole vocabulary is the value.

    Args:
        rows, distance: ``[documents, n]``, see `recall_document`; none at all where a process
            has no share.
    """
    starts = torch.tensor(_bucket_starts(window))
    total = torch.zeros(len(starts), 2, dtype=torch.float64)
    with evaluating(model):
        for tokens, far in zip(_parts(rows, batch), _parts(distance, batch), strict=True):
            logits = model(input_ids=tokens.to(device), use_cache=False).logits[:, :-1]
            right = logits.argmax(-1).cpu() == tokens[:, 1:]
            # Tokens that answer nothing, of distance 0, fall below the first bucket.
            bucket = torch.bucketize(far[:, 1:].contiguous(), starts, right=True)
            for column, chosen in enumerate((bucket[right], bucket.flatten())):
                total[:, column] += chosen.bincount(minlength=len(starts) + 1)[1:]
    return total


def recall_summary(hits: Tensor, window: int) -> dict[str, Any]:
    """Accuracy over all questions and by distance, from `recall_hits`; None without questions."""
    starts = _bucket_starts(window)
    edges = zip(starts, [*starts[1:], None], hits.tolist(), strict=True)
    return _accuracy(*hits.sum(0).tolist()) | {
        "by_distance": [{"from": low, "below": high} | _accuracy(*row) for low, high, row in edges]
    }


def _accuracy(right: float, asked: float) -> dict[str, Any]:
    return {"questions": int(asked), "accuracy": right / asked if asked else None}


def _bucket_starts(window: int) -> list[int]:
    """Distances of a question from its answer, in tokens, at which buckets begin."""
    return [1, window, 2 * window, 4 * window]


def gate_statistics(
    model: Any, rows: Tensor, batch: int, device: torch.device
) -> list[dict[str, Any]]:
    """Of every layer's gates over held-out text: mean, deviation over tokens, and mean by head.

    Args:
        rows: ``[sequences, n]``, of which the first few are read, `batch` at a time.

    Returns:
        One mapping per layer, "sa" and "swa" in it; nothing for a model without gates.
    """
    layers = gate_layers(model)
    found: dict[Any, list[Tensor]] = {layer: [] for layer in layers}

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module].append(module.gates(args[0] if args else kwargs["hidden_states"]).cpu())

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    if not hooks:
        return []
    try:
        with evaluating(model):
            for part in rows[:_GATE_SEQUENCES].split(batch):
                model(input_ids=part.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [_of_gates(torch.cat(found[layer], dim=1).double()) for layer in layers]


def _of_gates(gates: Tensor) -> dict[str, Any]:
    """Of one layer's gates, ``[2, sequences, q_heads, n]``."""
    row = {}
    for name, gate in zip(("sa", "swa"), gates, strict=True):
        by_head = gate.transpose(0, 1).flatten(1)
        row[name] = {
            "mean": float(by_head.mean()),
            "deviation_over_tokens": float(by_head.std(1).mean()),
            "heads": by_head.mean(1).tolist(),
        }
    return row
