"""Prompts that are too long: cut at the left, as lm-eval does, or in the middle.

LongBench (arXiv 2308.14508) keeps both ends of a long prompt, since instructions stand there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sa_patch.errors import choice
from sa_patch.evaluation.padded_batches import Request
from sa_patch.evaluation.reused_answers import ReusedAnswersLM

TRUNCATIONS = ("left", "middle")


def cut(tokens: list[int], most: int, truncation: str) -> list[int]:
    """At most `most` of the tokens: the last ones, or as many from either end."""
    if len(tokens) <= most:
        return tokens
    if truncation == "left":
        return tokens[-most:]
    first = most // 2
    return [*tokens[:first], *tokens[len(tokens) - (most - first) :]]


class CutPromptsLM(ReusedAnswersLM):
    """An lm-eval model whose prompts can be cut in the middle, and shorter than its context."""

    _truncation = "left"
    _max_prompt_tokens: int | None = None

    def cut_prompts(self, truncation: str = "left", max_prompt_tokens: int | None = None) -> None:
        """Say how prompts are cut from now on.

        Args:
            truncation: "left" or "middle".
            max_prompt_tokens: most tokens of a prompt, beside the model's own limit.
        """
        self._truncation = choice(truncation, "truncation", TRUNCATIONS)
        self._max_prompt_tokens = max_prompt_tokens

    @property
    def _cuts_as_lm_eval(self) -> bool:
        return self._truncation == "left" and self._max_prompt_tokens is None

    def _room(self, limit: int) -> int:
        return min(limit, self._max_prompt_tokens or limit)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], *arguments: Any, **named: Any
    ) -> list[tuple[float, bool]]:
        if not self._cuts_as_lm_eval:
            requests = [self._shortened(request) for request in requests]
        return super()._loglikelihood_tokens(requests, *arguments, **named)

    def _shortened(self, request: Request) -> Request:
        asked, context, continuation = request
        # The last token of the continuation is never an input.
        most = self._room(self.max_length + 1 - len(continuation))
        return asked, cut(context, max(most, 1), self._truncation), continuation

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """lm-eval's, for generation: ``[batch, n]`` tokens and their mask, padded on the left."""
        if self._cuts_as_lm_eval or left_truncate_len is None:
            found: tuple[Tensor, Tensor] = super().tok_batch_encode(
                strings, padding_side, left_truncate_len, truncation
            )
            return found
        rows, masks = super().tok_batch_encode(strings, "left", None, truncation)
        prompts = [row[mask.bool()].tolist() for row, mask in zip(rows, masks, strict=True)]
        most = self._room(left_truncate_len)
        longer = sum(len(prompt) > most for prompt in prompts)
        if longer:
            logging.getLogger(__name__).info("%d prompts cut to %d tokens", longer, most)
        prompts = [cut(prompt, most, self._truncation) for prompt in prompts]
        width = max(map(len, prompts))
        padding = self.tokenizer.pad_token_id
        tokens = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(tokens), torch.tensor(mask)
