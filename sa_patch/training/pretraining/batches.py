"""Which sequences a step trains on: a pure function of the seed and the step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sa_patch.errors import UserError
from sa_patch.training.pretraining.corpus import Corpus
from sa_patch.training.pretraining.recall import (
    KEY_TOKENS,
    START_TOKEN,
    VALUE_TOKENS,
    RecallTokens,
    recall_document,
)
from sa_patch.training.pretraining.settings import PretrainingSettings

# First part of a seed: the three streams of random numbers must not coincide.
_ORDER, _RECALL, _HELD_OUT = 0, 1, 2


class Batches:
    """Training and held-out sequences of a run.

    A step's sequences depend on the seed and the step alone, so that a resumed run needs no other
    state. The text is cut into chunks of `sequence` tokens, which every epoch shows once each, in
    an order of its own. A fixed share of the sequences, spread evenly, are recall documents, of
    which only the answers are trained on, each with the weight that the settings give it.

    Args:
        seed: of the order and of the recall documents.

    Raises:
        UserError: if the corpus is shorter than one sequence.
    """

    def __init__(self, corpus: Corpus, settings: PretrainingSettings, seed: int) -> None:
        self._corpus, self._settings, self._seed = corpus, settings, seed
        self._chunks = len(corpus.train) // settings.sequence
        if not self._chunks or len(corpus.validation) < settings.sequence:
            raise UserError(
                f"the text has {len(corpus.train)} training and {len(corpus.validation)} held-out "
                f"tokens, less than one sequence of {settings.sequence}"
            )
        self.recall_tokens = _recall_tokens(corpus)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def step(self, step: int, process: int = 0, processes: int = 1) -> tuple[Tensor, Tensor]:
        """One process's tokens of a step, int64 ``[batch / processes, n]``, and the weights of
        their losses, float32 of the same shape; 0 for tokens that are not trained on."""
        batch = self._settings.batch
        rows = [self._sequence(step * batch + index) for index in range(process, batch, processes)]
        tokens, weights = (np.stack(part) for part in zip(*rows, strict=True))
        return torch.from_numpy(tokens), torch.from_numpy(weights)

    def validation(self) -> Tensor:
        """The held-out text: ``[sequences, n]``, the last incomplete one left out."""
        length = self._settings.sequence
        count = len(self._corpus.validation) // length
        held_out = self._corpus.validation[: count * length].astype(np.int64)
        return torch.from_numpy(held_out.reshape(count, length))

    def recall(self) -> tuple[Tensor, Tensor]:
        """Held-out recall documents, alike for every seed: tokens and distances ``[count, n]``."""
        text, count = self._corpus.validation, self._settings.recall.documents
        rows = [self._recall_document([_HELD_OUT, index], text) for index in range(count)]
        tokens, distance = (np.stack(part) for part in zip(*rows, strict=True))
        return torch.from_numpy(tokens), torch.from_numpy(distance)

    def _sequence(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        share = self._settings.recall.share
        before = int(index * share)
        if int((index + 1) * share) > before:
            key = [_RECALL, self._seed, before]
            tokens, distance = self._recall_document(key, self._corpus.train)
            weight = np.float32(self._settings.recall.weight)
            return tokens, np.where(distance > 0, weight, np.float32(0))
        epoch, place = divmod(index - before, self._chunks)
        first = int(self._order(epoch)[place]) * self._settings.sequence
        chunk = self._corpus.train[first : first + self._settings.sequence].astype(np.int64)
        return chunk, np.ones(len(chunk), dtype=np.float32)

    def _recall_document(
        self, key: list[int], text: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        generator = np.random.default_rng(key)
        return recall_document(generator, self._settings.sequence, self.recall_tokens, text)

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([_ORDER, self._seed, epoch]).permutation(self._chunks)


def _recall_tokens(corpus: Corpus) -> RecallTokens:
    ids = corpus.tokenizer.convert_tokens_to_ids
    return RecallTokens(ids(START_TOKEN), tuple(ids(KEY_TOKENS)), tuple(ids(VALUE_TOKENS)))
