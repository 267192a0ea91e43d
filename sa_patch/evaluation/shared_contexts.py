"""Questions with several answers to choose from: their context is read once for all of them.

Under a prefix-stable pattern a context read first and an answer read behind it give what both give
in one piece (law 8). Under others (SA draws its permutation for the sequence's own length) every
answer is read with its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sa_patch.evaluation.padded_batches import (
    PaddedBatchesLM,
    Request,
    similar_lengths,
    takes_logits_to_keep,
)

# Two passes cost a little more than one of the same tokens: a question whose tokens shrink by less
# is left to lm-eval.
_WORTHWHILE = 0.75
# One token behind a cache is a generated one; a piece of a prompt has more.
_SHORTEST_PIECE = 2

Answer = tuple[float, bool]


class SharedContextsLM(PaddedBatchesLM):
    """Reads the context of a question once, and then its answers in one batch behind it.

    Attributes:
        share_contexts: whether to do so at all; with a batch size of one nothing is shared, so
            that every request is run by itself.
    """

    share_contexts: bool = True
    _behind_context = False

    @property
    def contexts_can_be_shared(self) -> bool:
        """Whether context and answer may enter the model one after the other."""
        raise NotImplementedError

    @contextmanager
    def _counting_time(self) -> Iterator[None]:
        yield

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        questions = self._questions(requests)
        rows = self._rows_at_once(requests, questions, override_bs)
        if rows > 1:
            for batch in self._batches(requests, questions, rows):
                answers.update(self._answer(requests, batch))
        rest = [index for index in range(len(requests)) if index not in answers]
        ran = super()._loglikelihood_tokens(
            [requests[index] for index in rest], disable_tqdm, override_bs, **kwargs
        )
        answers.update(zip(rest, ran, strict=True))
        return [answers[index] for index in range(len(requests))]

    def _questions(self, requests: Sequence[Request]) -> list[list[int]]:
        """Places of the requests that share a context, where that saves enough."""
        if not self.share_contexts or not self.contexts_can_be_shared:
            return []
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if continuation and len(context) + len(continuation) - 1 <= self.max_length:
                by_context.setdefault(tuple(context), []).append(index)
        return [
            together
            for context, together in by_context.items()
            if _saves_enough(len(context), [requests[index][2] for index in together])
        ]

    def _rows_at_once(
        self, requests: Sequence[Request], questions: Sequence[object], override_bs: int | None
    ) -> int:
        """How many answers are read at once."""
        if not questions:
            return 0
        if override_bs is not None:
            return override_bs
        if self.batch_size == "auto":
            return self._detect_batch_size([max(requests, key=self._input_length)], 0)
        return int(self.batch_size)

    def _batches(
        self, requests: Sequence[Request], questions: Sequence[list[int]], rows: int
    ) -> Iterator[list[list[int]]]:
        """Questions whose contexts are about equally long, up to `rows` answers of them."""
        by_length: dict[int, list[list[int]]] = {}
        for question in questions:
            by_length.setdefault(len(requests[question[0]][1]), []).append(question)
        for lengths in similar_lengths(sorted(by_length, reverse=True)):
            batch: list[list[int]] = []
            for question in (one for length in lengths for one in by_length[length]):
                if not self._fits(requests, [question], rows):
                    continue  # lm-eval reads its answers apart
                if batch and not self._fits(requests, [*batch, question], rows):
                    yield batch
                    batch = []
                batch.append(question)
            if batch:
                yield batch

    def _fits(self, requests: Sequence[Request], batch: Sequence[list[int]], rows: int) -> bool:
        lengths = [self._input_length(requests[index]) for question in batch for index in question]
        tokens = len(lengths) * max(lengths)
        return len(lengths) <= rows and (self.batch_tokens is None or tokens <= self.batch_tokens)

    @torch.no_grad()
    def _answer(
        self, requests: Sequence[Request], questions: Sequence[list[int]]
    ) -> dict[int, Answer]:
        """Log-likelihoods of the answers to some questions, by their places."""
        contexts = [requests[question[0]][1] for question in questions]
        places = [index for question in questions for index in question]
        owners = [at for at, question in enumerate(questions) for _ in question]
        answers = [requests[index][2] for index in places]
        ids, seen = _padded(contexts, self.device, left=True)
        with self._autocast(), self._counting_time():
            cache = DynamicCache(config=self.model.config)
            read = self._read(ids, seen, cache, last_alone=True)
            first = torch.log_softmax(read[:, -1], dim=-1, dtype=self.softmax_dtype)
            owner = torch.tensor(owners, device=self.device)
            cache.batch_select_indices(owner)
            pieces, kept = _padded([answer[:-1] for answer in answers], self.device, left=False)
            # What pads an answer comes after all that is asked for.
            seen = torch.cat([seen[owner], torch.ones_like(kept)], dim=1)
            self._behind_context = True
            try:
                read = self._read(pieces, seen, cache)
            finally:
                self._behind_context = False
            later = torch.log_softmax(read, dim=-1, dtype=self.softmax_dtype)
        found = {}
        for row, (index, answer) in enumerate(zip(places, answers, strict=True)):
            scores = torch.cat([first[owners[row], None], later[row, : len(answer) - 1]])
            tokens = torch.tensor(answer, device=self.device)
            greedy = bool((scores.argmax(dim=-1) == tokens).all())
            found[index] = (float(scores.gather(1, tokens[:, None]).sum()), greedy)
            if (request := requests[index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", request, found[index])
        return found

    def _read(
        self, ids: Tensor, seen: Tensor, cache: DynamicCache, *, last_alone: bool = False
    ) -> Tensor:
        """Logits ``[batch, n, vocabulary]``, or of the last token alone where the model can."""
        positions = (seen.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given: dict[str, Any] = {"position_ids": positions}
        if last_alone and takes_logits_to_keep(self.model):
            given["logits_to_keep"] = 1
        # Without a mask where nothing is padded, as in a batch of lm-eval's own.
        mask = None if bool(seen.all()) else seen.long()
        logits: Tensor = self.model(
            ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given
        ).logits
        return logits


def caches_keys_alone(model: PreTrainedModel) -> bool:
    """Whether a model remembers keys and values, and no states that padding would run through."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _saves_enough(context: int, answers: Sequence[Sequence[int]]) -> bool:
    pieces = {tuple(answer[:-1]) for answer in answers}
    if len(pieces) < 2:  # lm-eval reads requests of the same input once
        return False
    longest = max(_SHORTEST_PIECE, *map(len, pieces))
    apart = sum(context + len(piece) for piece in pieces)
    return context + len(answers) * longest <= _WORTHWHILE * apart


def _padded(
    sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool
) -> tuple[Tensor, Tensor]:
    """Token ids ``[batch, n]`` padded with zeros, and which of them are real."""
    width = max(_SHORTEST_PIECE, *map(len, sequences)) if not left else max(map(len, sequences))
    rows = [[0] * (width - len(one)) for one in sequences]
    ids = [[*pad, *one] if left else [*one, *pad] for pad, one in zip(rows, sequences, strict=True)]
    real = [
        [False] * len(pad) + [True] * len(one) if left else [True] * len(one) + [False] * len(pad)
        for pad, one in zip(rows, sequences, strict=True)
    ]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)
