"""What a candidate keeps: recovery of language modelling and of retrieval, on documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.evaluation.calibration.measurement import counted_log_likelihoods
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
    the mean probability of the answers' tokens: smoother than a share of answers found, so that few
    documents tell candidates apart. Recovery is that of `sa_patch.evaluation.recovery`.
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
                    recovered(float(ours.mean()), float(full.mean()), group == LANGUAGE)
                    for group, ours, full in self._groups(patterns, documents)
                ]
            )
        )

    def kept(self, patterns: Patterns, documents: Sequence[Document]) -> Kept:
        """The same with paired bootstrap intervals over documents."""
        groups, drawn, scores = {}, [], {}
        for group, ours, full in self._groups(patterns, documents):
            value, samples = bootstrap(ours[None], full, group == LANGUAGE, 0.0, group, DRAWS)
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
    ) -> list[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
        """Scores under the patterns and under full attention, by group."""
        found = []
        for group in (LANGUAGE, RETRIEVAL):
            own = [document for document in documents if group_of(document) == group]
            if not own:
                continue
            full = np.array(self.scores(None, own))
            if group == RETRIEVAL and full.mean() < LEAST_ABOVE_CHANCE:
                continue
            found.append((group, np.array(self.scores(patterns, own)), full))
        return found

    def _score(self, patterns: Patterns | None, document: Document) -> float:
        name = str(sorted((patterns or {}).items()))
        if (name, document) not in self._known:
            self._known[name, document] = self._measure(patterns, document)
        return self._known[name, document]

    def _measure(self, patterns: Patterns | None, document: Document) -> float:
        if patterns is None:
            likelihoods = counted_log_likelihoods(self._model, document)
        else:
            with patched(self._model, layers=patterns, backend=self._backend):
                likelihoods = counted_log_likelihoods(self._model, document)
        if group_of(document) == RETRIEVAL:
            likelihoods = likelihoods.exp()
        score = float(likelihoods.mean())
        if not math.isfinite(score):
            raise UserError(
                f"the model gives {score} for a document in {self._model.dtype}; try another "
                "--dtype"
            )
        return score


def group_of(document: Document) -> str:
    """What a document asks for."""
    return RETRIEVAL if document.kind == "recall" else LANGUAGE
