"""What a candidate keeps: recovery of language modelling and of retrieval, on documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.evaluation.calibration.measurement import counted_log_likelihoods, predicted
from sa_patch.evaluation.recovery import (
    DRAWS,
    LEAST_ABOVE_CHANCE,
    Interval,
    bootstrap,
    interval,
    recovered,
)
from sa_patch.patching import patched
from sa_patch.patterns import Pattern

LANGUAGE, RETRIEVAL = "language modelling", "retrieval"

Patterns = Mapping[int, Pattern]
"""The pattern of every sparse layer."""


@dataclass(frozen=True)
class Kept:
    """Recovery on some documents, by group and as the mean over groups, with intervals.

    ``draws`` are the bootstrap's means, paired with those of other patterns on these documents.
    ``full`` are full attention's scores by group.
    """

    groups: Mapping[str, Interval]
    mean: Interval
    draws: NDArray[np.float64]
    full: Mapping[str, float]


class Quality:
    """Scores documents under patterns; what is known is not computed again.

    The score of a text is the mean log-likelihood of its counted tokens, that of hidden pass words
    the mean probability of the right ones among all pass words there are: smoother than a share of
    answers found, so that few documents tell candidates apart, and not lower where a model would
    rather say something else. Recovery is that of `sa_patch.evaluation.recovery`.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto") -> None:
        self._model = model
        self._backend = backend
        self._known: dict[tuple[str, Document], float] = {}

    def recovery(self, patterns: Patterns, documents: Sequence[Document]) -> float:
        """The mean over the groups that full attention has something to recover in.

        Raises:
            UserError: if a score is no finite number.
        """
        return float(
            np.mean(
                [
                    recovered(float(ours.mean()), float(full.mean()), group == LANGUAGE, chance)
                    for group, ours, full, chance in self._groups(patterns, documents)
                ]
            )
        )

    def kept(self, patterns: Patterns, documents: Sequence[Document]) -> Kept:
        """The same with paired bootstrap intervals over documents."""
        groups, drawn, scores = {}, [], {}
        for group, ours, full, chance in self._groups(patterns, documents):
            value, samples = bootstrap(ours[None], full, group == LANGUAGE, chance, group, DRAWS)
            groups[group] = interval(value, samples)
            drawn.append(samples)
            scores[group] = float(full.mean())
        draws = np.mean(drawn, axis=0)
        mean = float(np.mean([each.value for each in groups.values()]))
        return Kept(groups, interval(mean, draws), draws, scores)

    def scores(self, patterns: Patterns | None, documents: Sequence[Document]) -> list[float]:
        """One score for each document; of full attention for None."""
        return [self._score(patterns, document) for document in documents]

    def _groups(
        self, patterns: Patterns, documents: Sequence[Document]
    ) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64], float]]:
        """Scores under the patterns and under full attention, and of guessing, by group."""
        found = []
        for group in (LANGUAGE, RETRIEVAL):
            own = [document for document in documents if group_of(document) == group]
            if not own:
                continue
            full = np.array(self.scores(None, own))
            chance = 1 / len(own[0].choices) if group == RETRIEVAL else 0.0
            if group == RETRIEVAL and full.mean() - chance < LEAST_ABOVE_CHANCE:
                continue
            found.append((group, np.array(self.scores(patterns, own)), full, chance))
        return found

    def _score(self, patterns: Patterns | None, document: Document) -> float:
        name = str(sorted((patterns or {}).items()))
        if (name, document) not in self._known:
            self._known[name, document] = self._measure(patterns, document)
        return self._known[name, document]

    def _measure(self, patterns: Patterns | None, document: Document) -> float:
        score = answers_found if group_of(document) == RETRIEVAL else mean_log_likelihood
        if patterns is None:
            found = score(self._model, document)
        else:
            with patched(self._model, layers=patterns, backend=self._backend):
                found = score(self._model, document)
        if not math.isfinite(found):
            raise UserError(
                f"the model gives {found} for a document in {self._model.dtype}; try another "
                "--dtype"
            )
        return found


def mean_log_likelihood(model: PreTrainedModel, document: Document) -> float:
    """Of the tokens that count, in nats."""
    return float(counted_log_likelihoods(model, document).mean())


def answers_found(model: PreTrainedModel, document: Document) -> float:
    """The mean probability of the right pass words, were the model to say one of all there are."""
    logits = predicted(model, document, document.asked)
    right = torch.tensor([document.choices.index(document.tokens[at]) for at in document.asked])
    among = logits[:, list(document.choices)].softmax(-1).double().cpu()
    return float(among.gather(-1, right[:, None]).mean())


def group_of(document: Document) -> str:
    """What a document asks for."""
    return RETRIEVAL if document.kind == "recall" else LANGUAGE
