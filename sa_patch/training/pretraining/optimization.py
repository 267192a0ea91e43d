"""What a training step minimizes, and how fast: loss, weight decay and learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sa_patch.training.pretraining.settings import PretrainingSettings


def learning_rate(settings: PretrainingSettings, step: int) -> float:
    """Of a step, counted from 0: a linear rise, then a cosine down to `final_share` of the peak."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    left = max(settings.steps - 1 - settings.warmup, 1)
    cosine = (1 + math.cos(math.pi * (step - settings.warmup) / left)) / 2
    share = settings.final_share + (1 - settings.final_share) * cosine
    return settings.learning_rate * share


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum of the weighted negative log-likelihoods in nats; the first tokens are not scored.

    Args:
        logits: ``[batch, n, vocabulary]``; those at t predict token t + 1.
        tokens, weights: ``[batch, n]``.
    """
    flat = logits[:, :-1].float().flatten(0, 1)
    losses = cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For the optimizer: matrices, which decay, and vectors (norms and biases), which do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
