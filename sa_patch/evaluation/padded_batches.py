"""Padding and batches of log-likelihood requests: scores must not depend on the batch size.

lm-eval pads these batches on the right and passes no mask. Causality alone makes that harmless for
prefix-stable patterns. For the others (SA draws its permutation for the sequence's own length), and
where visible keys are counted as they are chosen, each batch is made of sequences of one length, so
that there is no padding at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.models.huggingface import HFLM

Request = tuple[tuple[str, str] | None, list[int], list[int]]

# With a limit on a batch's tokens, requests that share one differ in length by this much at most,
# so that little of it is padding.
_SHORTEST_OF_BATCH = 0.8


class PaddedBatchesLM(HFLM):
    """lm-eval's `hf` model, which pads only where padding changes no score.

    Attributes:
        batch_tokens: most tokens of a batch, padding counted; None for no such limit.
    """

    batch_tokens: int | None = None

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
        if not requests or (self.padding_is_harmless and self.batch_tokens is None):
            return self._run(requests, disable_tqdm, override_bs, **kwargs)
        by_length: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            by_length.setdefault(self._input_length(request), []).append(index)
        lengths = sorted(by_length, reverse=True)
        if self.batch_size == "auto" and override_bs is None:
            longest = [requests[by_length[lengths[0]][0]]]
            override_bs = self._detect_batch_size(longest, 0)
        equal = [[length] for length in lengths]
        answers: dict[int, tuple[float, bool]] = {}
        for together in similar_lengths(lengths) if self.padding_is_harmless else equal:
            members = [index for length in together for index in by_length[length]]
            with self._at_most_tokens(together[0]):
                part = self._run([requests[i] for i in members], True, override_bs, **kwargs)
            answers.update(zip(members, part, strict=True))
        return [answers[index] for index in range(len(requests))]

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


def similar_lengths(lengths: Iterable[int]) -> list[list[int]]:
    """Falling lengths in groups whose shortest is not much shorter than their longest."""
    groups: list[list[int]] = []
    for length in lengths:
        if groups and length >= _SHORTEST_OF_BATCH * groups[-1][0]:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups
