"""What a candidate spends, known before it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.evaluation.calibration.thresholds import seek_threshold
from sa_patch.evaluation.metering.observed_keys import Observed
from sa_patch.evaluation.metering.pattern_meter import HeadShape
from sa_patch.evaluation.metering.visited_meter import VisitedMeter
from sa_patch.kernels import Spans
from sa_patch.kernels.visited_keys import BLOCK_SIZES
from sa_patch.patching import observe_layers, patched
from sa_patch.patterns import Full, MoBA, Pattern, fit_budget, flops_share, parse_pattern

# Reads content, so that a meter names the layers whose queries and keys it must be shown.
_READER = MoBA(block_size=16, topk=1)
VISITED_BLOCK = BLOCK_SIZES[0]


class _TooLarge(Exception):
    """The least pattern of a family spends more than the budget."""


class Costs:
    """Shares of full attention's cost at the length of one document, choosing included.

    What tiles read under a choice by content, and all that thresholds and shared choices show, is
    counted on the queries and keys that the document gives the model under full attention, in a few
    layers that stand for all.

    Args:
        layers: those that are sparse; a mean over them is meant throughout.
    """

    def __init__(self, model: PreTrainedModel, document: Document, layers: Sequence[int]) -> None:
        self.n = len(document.tokens)
        self._shape = HeadShape.of(model.config)
        self._layers = list(layers)
        self._group = self._shape.heads // self._shape.kv_heads
        observed = self._meter({layer: _READER for layer in layers}).layers
        self._content = read_content(model, document, observed)
        self._alone = lru_cache(maxsize=4096)(self._visited_alone)
        self._shown = lru_cache(maxsize=4096)(self._flops_shown)

    def flops(self, patterns: Mapping[int, Pattern]) -> float:
        """Attention FLOPs of the layers, as a share of full attention's."""
        shares = [self._flops_alone(pattern) for pattern in patterns.values()]
        return sum(shares) / len(shares)

    def visited(self, patterns: Mapping[int, Pattern]) -> float:
        """What tiles of queries read in blocks of 16, as a share of full attention's."""
        meter = self._meter(patterns)
        for layer in meter.layers:
            nearest = min(self._content, key=lambda known: abs(known - layer))
            meter.observe(layer, *self._content[nearest], Spans((self.n,), (0,)))
        counted = meter.summary({self.n: 1})
        name = str(VISITED_BLOCK)
        return float(counted["visited_keys"][name] / counted["full_visited_keys"][name])

    def fit(self, family: str, share: float, cost: str) -> Pattern:
        """The largest pattern of a family within a share of "flops" or "visited".

        Its number is a whole one or, where it may be a fraction, a threshold.

        Raises:
            UserError: if its smallest is too large already, or it cannot be built.
        """
        share_of = self._alone if cost == "visited" else self._flops_alone
        if _takes_fractions(family):
            return seek_threshold(family, share, share_of, cost)
        least: list[Pattern] = []

        def spent(pattern: Pattern, seq_len: int, group: int) -> float:
            found = share_of(pattern)
            # More of the number costs more: where the least is too large, none will do.
            if not least and found > share:
                raise _TooLarge(
                    f"even {pattern} spends {found:.3f} of full attention's {cost}, more than "
                    f"{share:g}"
                )
            least.append(pattern)
            return found

        try:
            return fit_budget(family, self.n, share, self._group, spent)
        except _TooLarge as error:
            raise UserError(str(error)) from None

    def _visited_alone(self, pattern: Pattern) -> float:
        """Of one pattern in all layers."""
        return self.visited({layer: pattern for layer in self._layers})

    def _flops_alone(self, pattern: Pattern) -> float:
        # What shared choices show is otherwise only known as if they were random: far more.
        content = pattern.keys_are_bounds or pattern.shared_queries > 1
        return self._shown(pattern) if content else flops_share(pattern, self.n, self._group)

    def _flops_shown(self, pattern: Pattern) -> float:
        """Of a pattern whose keys the text decides about."""
        observed = Observed()
        for layer, (q, k) in self._content.items():
            observed.add(pattern, layer, q, k, Spans((self.n,), (0,)))
        keys = [observed.means(layer)[0] for layer in self._content]
        dots = float(pattern.selection_dots(self.n, self._group).sum())
        return (2 * sum(keys) / len(keys) + dots / self.n) / (self.n + 1)

    def _meter(self, patterns: Mapping[int, Pattern]) -> VisitedMeter:
        own = {layer: (pattern,) for layer, pattern in patterns.items()}
        return VisitedMeter(own, self._shape.heads, self._shape.kv_heads)


def _takes_fractions(family: str) -> bool:
    with suppress(UserError):
        parse_pattern(family.replace("{}", "0.5"))
        return True
    return False


@torch.inference_mode()
def read_content(
    model: PreTrainedModel, document: Document, layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries ``[1, heads, n, head_dim]`` and keys of some layers under full attention."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
        found[layer] = q.clone(), k.clone()

    with patched(model, Full(), layers=layers):
        observe_layers(model, keep, layers)
        model(
            torch.tensor([document.tokens], device=model.device), use_cache=False, logits_to_keep=1
        )
    return found
