"""``sa-patch calibrate``: which layers to leave full, measured one layer at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.evaluation.calibration.loss_store import LossStore
from sa_patch.kernels import check_backend
from sa_patch.patching import Schedule, patched
from sa_patch.patterns import Pattern


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood of the tokens that count, in nats.

    Args:
        mean: over documents, each with the mean of its own tokens.
        by_kind: the same over the documents of each kind.
    """

    mean: float
    by_kind: Mapping[str, float]

    def minus(self, other: Loss) -> Loss:
        kinds = {kind: value - other.by_kind[kind] for kind, value in self.by_kind.items()}
        return Loss(self.mean - other.mean, kinds)

    def to_plain(self) -> dict[str, Any]:
        return {"mean": self.mean, "by_kind": dict(self.by_kind)}


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Args:
        full: loss of the stock model on the calibration documents.
        sparse: loss with all candidates sparse.
        rises: by layer, how much the loss rises when it alone goes sparse.
        schedules: full layers of the calibrated schedule ("calibrated") and of its rivals, by name.
        held_out: losses of the schedules on the held-out documents, by name, with those of "full"
            and "all sparse"; empty where they were not compared.
    """

    full: Loss
    sparse: Loss
    rises: Mapping[int, Loss]
    schedules: Mapping[str, Sequence[int]]
    held_out: Mapping[str, Loss]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "loss_full": self.full.to_plain(),
            "loss_all_sparse": self.sparse.to_plain(),
            "rises": {str(layer): rise.to_plain() for layer, rise in self.rises.items()},
            "schedules": {name: list(kept) for name, kept in self.schedules.items()},
            "held_out": {name: loss.to_plain() for name, loss in self.held_out.items()},
        }


def most_harmed(rises: Mapping[int, float], budget: int) -> list[int]:
    """The `budget` layers whose loss rises most when they go sparse; of equal ones the first."""
    ranked = sorted(rises, key=lambda layer: (-rises[layer], layer))
    return sorted(ranked[:budget])


def every_kth(layers: Sequence[int], budget: int) -> list[int]:
    """Layers at even distances, the middles of `budget` equal parts of the stack."""
    return [layers[int((2 * part + 1) * len(layers) / (2 * budget))] for part in range(budget)]


def first(layers: Sequence[int], budget: int) -> list[int]:
    """The layers nearest the input."""
    return list(layers[:budget])


def last(layers: Sequence[int], budget: int) -> list[int]:
    """The layers nearest the output."""
    return list(layers[len(layers) - budget :])


def ends(layers: Sequence[int], budget: int) -> list[int]:
    """Half of them at either end, the odd one at the input."""
    return first(layers, budget - budget // 2) + last(layers, budget // 2)


RIVALS: Mapping[str, Callable[[Sequence[int], int], list[int]]] = {
    "every k-th": every_kth,
    "first": first,
    "last": last,
    "first and last": ends,
}
"""Rules that need no measurement, by name: full layers from all candidates and a budget."""


def check_budget(budget: int | None, candidates: Sequence[int]) -> int:
    """The number of full layers, by default one in five.

    Raises:
        UserError: if none would be left sparse.
    """
    if budget is None:
        return max(1, len(candidates) // 5) if len(candidates) > 1 else 0
    if budget < 0 or budget >= len(candidates):
        raise UserError(
            f"--full-layers must leave at least one of {len(candidates)} layers sparse, so it is "
            f"a whole number from 0 to {len(candidates) - 1}; got {budget}"
        )
    return budget


class Calibrator:
    """Measures losses of one model under schedules of one pattern; what is known is not redone.

    Args:
        model: the model, unpatched.
        patterns: of the sparse layers; losses are averaged over them, draws of one pattern.
        candidates: layers that may go sparse; all others stay as they are.
        store: where losses are kept.
        backend: see `sa_patch.patch_model`.
        on_layer: told each layer and its rise as they are known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        patterns: Sequence[Pattern],
        candidates: Sequence[int],
        store: LossStore,
        backend: str = "auto",
        on_layer: Callable[[int, Loss], None] = lambda layer, rise: None,
    ) -> None:
        self._model = model
        self._patterns = list(patterns)
        self.candidates = tuple(candidates)
        self._store = store
        self._backend = check_backend(backend)
        self._on_layer = on_layer

    def loss(self, documents: Sequence[Document], sparse: Sequence[int]) -> Loss:
        """Loss with these layers sparse, averaged over the draws.

        Raises:
            UserError: if it is no finite number.
        """
        patterns = self._patterns if sparse else self._patterns[:1]
        losses: list[list[float]] = [[] for _ in documents]
        for pattern in patterns:
            for place, document in enumerate(documents):
                losses[place].append(self._nll(document, pattern, sparse))
        means = [statistics.fmean(each) for each in losses]
        kinds: dict[str, list[float]] = {}
        for document, mean in zip(documents, means, strict=True):
            kinds.setdefault(document.kind, []).append(mean)
        return Loss(
            statistics.fmean(means), {kind: statistics.fmean(each) for kind, each in kinds.items()}
        )

    def calibrate(
        self, documents: Sequence[Document], held_out: Sequence[Document], budget: int
    ) -> Calibration:
        """Every layer alone, the schedule that follows, and its rivals on `held_out` if any."""
        full = self.loss(documents, [])
        rises: dict[int, Loss] = {}
        for layer in self.candidates:
            rises[layer] = self.loss(documents, [layer]).minus(full)
            self._on_layer(layer, rises[layer])
        calibrated = most_harmed({layer: rise.mean for layer, rise in rises.items()}, budget)
        schedules = {"calibrated": calibrated}
        schedules |= {name: rule(self.candidates, budget) for name, rule in RIVALS.items()}
        compared: dict[str, Loss] = {}
        if held_out:
            compared["full"] = self.loss(held_out, [])
            compared |= {
                name: self.loss(held_out, self.others(kept)) for name, kept in schedules.items()
            }
            compared["all sparse"] = self.loss(held_out, self.candidates)
        return Calibration(full, self.loss(documents, self.candidates), rises, schedules, compared)

    def others(self, full: Sequence[int]) -> list[int]:
        """The candidates that are sparse when these are full."""
        return [layer for layer in self.candidates if layer not in set(full)]

    def _nll(self, document: Document, pattern: Pattern, sparse: Sequence[int]) -> float:
        name = "full" if not sparse else f"{pattern} layers {Schedule.read(sparse)}"
        known = self._store.get(name, document)
        if known is None:
            known = self._measure(document, pattern, sparse)
            if not math.isfinite(known):
                raise UserError(
                    f"the loss is {known} with {name} in {self._model.dtype}; try another --dtype"
                )
            self._store.put(name, document, known)
        return known

    def _measure(self, document: Document, pattern: Pattern, sparse: Sequence[int]) -> float:
        if not sparse:
            return document_nll(self._model, document)
        with patched(self._model, pattern, layers=sparse, backend=self._backend):
            return document_nll(self._model, document)


def document_nll(model: PreTrainedModel, document: Document) -> float:
    """Mean negative log-likelihood of a document's counted tokens, in nats; one prefill."""
    return -float(counted_log_likelihoods(model, document).mean())


def counted_log_likelihoods(model: PreTrainedModel, document: Document) -> Tensor:
    """Log-likelihoods of a document's counted tokens, in nats: float64 ``[counted]``."""
    logits = predicted(model, document, document.counted)
    answers = torch.tensor(document.tokens, device=logits.device)[list(document.counted), None]
    return logits.log_softmax(-1).gather(-1, answers)[:, 0].double()


@torch.inference_mode()
def predicted(model: PreTrainedModel, document: Document, places: Sequence[int]) -> Tensor:
    """What a model expects at some places of a document: logits, float32 ``[places, tokens]``."""
    tokens = torch.tensor([document.tokens], device=model.device)
    # A row of logits predicts the token after it, and the last predicts what is not there.
    rows = len(document.tokens) - min(places) + 1
    logits = model(tokens, use_cache=False, logits_to_keep=rows).logits[0]
    wanted = torch.tensor(places, device=logits.device) - (len(document.tokens) - rows) - 1
    return logits[wanted].float()
