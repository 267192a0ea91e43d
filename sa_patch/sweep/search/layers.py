"""Candidates over the layers of a model: one pattern for all, or shares of the budget by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optuna.trial import Trial

from sa_patch.errors import UserError
from sa_patch.patterns import Pattern
from sa_patch.sweep.search.quality import Patterns

# Parts of the stack, of the sampled layers of a meter one each.
PARTS = 3
LEAST, MOST = 0.25, 2.0

EVEN = {f"part {part}": 1.0 for part in range(PARTS)}
"""The same for all layers."""


def parts_of_stack(layers: Sequence[int]) -> list[list[int]]:
    """The layers in equal parts, from the input to the output."""
    edges = [len(layers) * part // PARTS for part in range(PARTS + 1)]
    return [list(layers[low:high]) for low, high in zip(edges, edges[1:], strict=False)]


def suggest_layers(
    trial: Trial, layers: Sequence[int], share: float, fit: Callable[[float], Pattern]
) -> Patterns:
    """Patterns of one family, larger in some parts of the stack, that keep to the share together.

    Raises:
        UserError: if a part has no pattern within its share.
    """
    parts = parts_of_stack(layers)
    weights = [trial.suggest_float(name, LEAST, MOST, log=True) for name in EVEN]
    total = sum(weight * len(part) for weight, part in zip(weights, parts, strict=True))
    found: dict[int, Pattern] = {}
    for weight, part in zip(weights, parts, strict=True):
        own = share * weight * len(layers) / total
        if own >= 1:
            raise UserError(f"a part of the layers would get {own:.2f} of full attention's cost")
        found |= dict.fromkeys(part, fit(own))
    return found
