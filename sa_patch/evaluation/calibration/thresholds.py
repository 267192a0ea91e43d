"""A threshold that spends a share of full attention's cost, measured where the pattern is run.

What a threshold shows depends on the text, so that `fit_budget` cannot know its cost. Here it is
run on texts, and counted, choosing included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.evaluation.metering.pattern_meter import HeadShape, PatternMeter
from sa_patch.kernels.visited_keys import BLOCK_SIZES
from sa_patch.patching import layer_patterns, observe_layers, patched, stock_patterns
from sa_patch.patterns import Pattern, parse_pattern

COSTS = {"flops": "FLOPs", "visited": "visited keys"}
# Halvings of the range of numbers, of which a text form keeps so many digits; what spends this much
# of the share is near enough.
_STEPS = 10
_ENOUGH = 0.99
_DIGITS = 4
# Numbers that stand for no share: the exponents of 10 between which they are sought.
_EXPONENTS = (-2.0, 6.0)


@dataclass(frozen=True)
class Spent:
    """What a pattern spent on some texts.

    Args:
        share: of full attention's FLOPs on the same texts, choosing included.
        mean_keys: keys that a query saw, over queries, layers and heads.
        visited: share of the keys that a tile of queries reads under full attention, in blocks of
            16, choosing included, from a few layers and texts.
    """

    share: float
    mean_keys: float
    visited: float

    def of(self, cost: str) -> float:
        """The share of "flops" or of "visited" keys."""
        return self.visited if cost == "visited" else self.share


def measure_spent(
    model: Any, pattern: Pattern, documents: Sequence[Tensor], backend: str = "auto"
) -> Spent:
    """Run a model under a pattern, and count; the model is then as it was.

    Args:
        documents: token ids, int64 ``[n]`` each, of any lengths.
    """
    with torch.no_grad(), patched(model, pattern, backend=backend):
        meter = PatternMeter(
            layer_patterns(model), HeadShape.of(model.config), stock_patterns(model)
        )
        observe_layers(model, meter.observe, meter.sampled_layers)
        for tokens in documents:
            model(tokens[None].to(model.device), use_cache=False, logits_to_keep=1)
            meter.add([len(tokens)])
    found = meter.summary()
    share = found["attention_flops"] / found["full_attention_flops"]
    size = str(BLOCK_SIZES[0])
    visited = found["visited_keys"][size] / found["full_visited_keys"][size]
    return Spent(share, found["mean_keys_per_query"], visited)


def fit_threshold(
    model: Any,
    family: str,
    share: float,
    documents: Sequence[Tensor],
    cost: str = "flops",
    backend: str = "auto",
    report: Callable[[Pattern, Spent], None] = lambda pattern, spent: None,
) -> tuple[Pattern, Spent]:
    """The pattern of a family that spends nearly a share of full attention's cost, and no more.

    Within 1%, or the most that ten halvings of the range found below it.

    ``fit_threshold(model, "prism:{},64", 1 / 8, documents)`` finds the threshold. The share holds
    for texts like these, of their lengths; what it is on others is measured there.

    Args:
        family: text form with ``{}`` for the number that is sought, from 0 to 1, or where the
            method allows larger ones up to 10^6; the share rises or falls with it throughout.
        share: above 0 and at most 1.
        documents: as of `measure_spent`, at least one.
        cost: "flops", or "visited" for the keys that a tile of queries reads.
        report: called after each try, of which there are up to 12.

    Returns:
        The pattern and what it spent.

    Raises:
        UserError: if the text form has no ``{}`` or is none, or if even the pattern that shows
            least spends more.
    """
    check_family(family)
    if not documents or not 0 < share <= 1:
        raise UserError(f"give documents, and a share above 0 and at most 1; got {share!r}")

    measured: dict[Pattern, Spent] = {}

    def spent(pattern: Pattern) -> float:
        measured[pattern] = measure_spent(model, pattern, documents, backend)
        report(pattern, measured[pattern])
        return measured[pattern].of(cost)

    found = seek_threshold(family, share, spent, cost)
    return found, measured[found]


def seek_threshold(
    family: str, share: float, spent: Callable[[Pattern], float], cost: str
) -> Pattern:
    """As `fit_threshold`, for whatever tells the share that a pattern spends of a cost.

    Raises:
        UserError: if even the pattern that shows least spends more.
    """
    low, high = 0.0, 1.0
    ends = [_member(family, low), _member(family, high)]
    shares = [spent(end) for end in ends]
    least, most = sorted((0, 1), key=lambda end: shares[end])
    if shares[least] > share:
        raise UserError(
            f"even {ends[least]} spends {shares[least]:.3f} of full attention's {COSTS[cost]} on "
            f"these texts, choosing included, more than {share:g}; take a larger share, or other "
            "blocks"
        )
    if shares[most] <= share:
        return ends[most]
    best, best_share = ends[least], shares[least]
    for _ in range(_STEPS):
        middle = (low + high) / 2
        pattern = _member(family, middle)
        found = spent(pattern)
        within = found <= share
        if within and found >= best_share:
            best, best_share = pattern, found
        if best_share >= _ENOUGH * share:
            break
        # The half that leads to more where this is within the share, and to less where not.
        if within == (most == 1):
            low = middle
        else:
            high = middle
    return best


def check_family(family: str) -> None:
    """Refuse a family that names no pattern.

    Raises:
        UserError: if it has no ``{}``, or is no text form with a number in its place.
    """
    if "{}" not in family:
        raise UserError(
            "a family has {} for the number that is sought, such as prism:{},64; got "
            + repr(family)
        )
    _member(family, 1.0)


def _member(family: str, place: float) -> Pattern:
    """The pattern at a place from 0 to 1 of the range of its number."""
    first, last = _EXPONENTS
    bounded = True
    with suppress(UserError):
        parse_pattern(family.replace("{}", "2.5"))
        bounded = False
    number = max(place, 1e-3) if bounded else 10 ** (first + (last - first) * place)
    # A plus would join parts of a union.
    return parse_pattern(family.replace("{}", f"{number:.{_DIGITS}g}".replace("e+", "e")))
