"""Padding, batches and logits of log-likelihood requests: scores do not depend on the batch size.

lm-eval pads these batches on the right with zeros and passes no mask. Causality alone makes that
harmless for prefix-stable patterns. For the others (SA draws its permutation for the sequence's own
length), and where visible keys are counted as they are chosen, the rows' lengths are found from the
requests, and the model is given the mask that lm-eval leaves out. They also tell which logits are
asked for: the vocabulary's matrix is a fifth of a small model's work, and no context needs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

Request = tuple[tuple[str, str] | None, list[int], list[int]]

# With a limit on a batch's tokens, requests that share one differ in length by this much at most,
# so that little of it is padding.
_SHORTEST_OF_BATCH = 0.8


@dataclass(frozen=True)
class Row:
    """A sequence that enters the model: how long it is, and the first place whose logits count."""

    length: int
    first_asked: int


class PaddedBatchesLM(HFLM):
    """lm-eval's `hf` model, which pads only where padding changes no score.

    Attributes:
        batch_tokens: most tokens of a batch, padding counted; None for no such limit.
    """

    batch_tokens: int | None = None
    _rows: dict[tuple[int, ...], Row] | None = None

    @property
    def padding_is_harmless(self) -> bool:
        """Whether sequences of different lengths may share a batch."""
        raise NotImplementedError

    def _input_length(self, request: Request) -> int:
        """Tokens of a request that enter the model, cut as lm-eval cuts them."""
        _, context, continuation = request
        return min(len(context) + len(continuation) - 1, self.max_length)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        rows = self._rows_of(requests)
        by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            by_length.setdefault(self._input_length(request), []).append(index)
        groups = [sorted(by_length, reverse=True)]
        if rows is None and not self.padding_is_harmless:
            groups = [[length] for length in groups[0]]
        elif self.batch_tokens is not None:
            groups = similar_lengths(groups[0])
        if len(groups) > 1 and self.batch_size == "auto" and override_bs is None:
            longest = [requests[by_length[groups[0][0]][0]]]
            override_bs = self._detect_batch_size(longest, 0)
        answers: dict[int, tuple[float, bool]] = {}
        self._rows = rows
        try:
            for together in groups:
                members = [index for length in together for index in by_length[length]]
                hidden = disable_tqdm or len(groups) > 1
                with self._at_most_tokens(together[0]):
                    part = self._run([requests[i] for i in members], hidden, override_bs, **kwargs)
                answers.update(zip(members, part, strict=True))
        finally:
            self._rows = None
        return [answers[index] for index in range(len(requests))]

    def _rows_of(self, requests: Sequence[Request]) -> dict[tuple[int, ...], Row] | None:
        """What enters the model, by its tokens without the zeros at their end.

        None where inputs differ in zeros at their end alone: once padded they look the same.
        """
        rows: dict[tuple[int, ...], Row] = {}
        for request in requests:
            _, context, continuation = request
            tokens = tuple([*context, *continuation][-(self.max_length + 1) :][:-1])
            first = max(0, len(tokens) - len(continuation))
            known = rows.setdefault(without_zeros(tokens), Row(len(tokens), first))
            if known.length != len(tokens):
                return None
            if first < known.first_asked:
                rows[without_zeros(tokens)] = Row(len(tokens), first)
        return rows

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits ``[batch, n, vocabulary]``, or of fewer last places, which lm-eval counts back."""
        if self._rows is None:
            unmasked: Tensor = super()._model_call(inps, attn_mask, labels)
            return unmasked
        rows = [self._rows[without_zeros(row)] for row in inps.tolist()]
        given: dict[str, Any] = {}
        if not self.padding_is_harmless:
            places = torch.arange(inps.shape[1], device=inps.device)
            lengths = torch.tensor([row.length for row in rows], device=inps.device)
            given["attention_mask"] = (places < lengths[:, None]).long()
        if takes_logits_to_keep(self.model):
            given["logits_to_keep"] = inps.shape[1] - min(row.first_asked for row in rows)
        with torch.no_grad(), self._autocast():
            logits: Tensor = self.model(inps, **given).logits
        return logits

    def _autocast(self) -> torch.autocast:
        precision = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=precision, enabled=precision is not None)

    @contextmanager
    def _at_most_tokens(self, length: int) -> Iterator[None]:
        """Have batches of sequences of `length` tokens hold no more than `batch_tokens`."""
        if self.batch_tokens is None or self.batch_size == "auto":
            yield
            return
        before = int(self.batch_size)
        self.batch_size_per_gpu = max(1, min(before, self.batch_tokens // length))
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def _run(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool,
        override_bs: int | None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        result: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            list(requests), disable_tqdm=disable_tqdm, override_bs=override_bs, **kwargs
        )
        return result


def without_zeros(row: Sequence[int]) -> tuple[int, ...]:
    """A row without the zeros at its end, padding or not."""
    end = len(row)
    while end and row[end - 1] == 0:
        end -= 1
    return tuple(row[:end])


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether a model can be told how many last places to give logits for."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def similar_lengths(lengths: Iterable[int]) -> list[list[int]]:
    """Falling lengths in groups whose shortest is not much shorter than their longest."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and length >= _SHORTEST_OF_BATCH * groups[-1][0]:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups
