"""An lm-eval model that asks full attention's answers before it runs a saturated prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from sa_patch.evaluation.full_answers import FullAnswers
from sa_patch.evaluation.metering.pattern_meter import PatternMeter, padding_lengths
from sa_patch.evaluation.padded_batches import Request
from sa_patch.evaluation.shared_contexts import SharedContextsLM
from sa_patch.evaluation.token_scores import score_window, window_of

# What generation is told that changes nothing of a greedy answer, or is part of the question.
_NO_QUESTION = frozenset({"attention_mask", "temperature", "use_cache"})


class ReusedAnswersLM(SharedContextsLM):
    """Runs only the prompts whose answers are not known, and keeps those of full attention.

    Whether a prompt is saturated is the meter's to say; all prompts enter it, run or not.

    Attributes:
        meter: of the pattern that is in use.
        full_answers: known answers of this model; None to run every prompt.
    """

    meter: PatternMeter
    full_answers: FullAnswers | None = None

    @property
    def generates_in_full(self) -> bool:
        """Whether what is generated behind a saturated prompt is what full attention generates."""
        raise NotImplementedError

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], *arguments: Any, **named: Any
    ) -> list[tuple[float, bool]]:
        known: dict[int, tuple[float, bool]] = {}
        for index, request in enumerate(requests):
            if (found := self._known(request)) is not None:
                known[index] = found
        run = [request for index, request in enumerate(requests) if index not in known]
        self.meter.add(self._prefills(run))
        self.meter.add_reused(self._prefills([requests[index] for index in known]))
        answers = super()._loglikelihood_tokens(run, *arguments, **named) if run else []
        for request, answer in zip(run, answers, strict=True):
            if self.full_answers is not None and self.meter.saturated(self._input_length(request)):
                self.full_answers.add(list(answer), "log-likelihood", *request[1:])
        rest = iter(answers)
        return [known[i] if i in known else next(rest) for i in range(len(requests))]

    def _known(self, request: Request) -> tuple[float, bool] | None:
        if self.full_answers is None or not self.meter.saturated(self._input_length(request)):
            return None
        found = self.full_answers.find("log-likelihood", *request[1:])
        return None if found is None else (found[0], found[1])

    def _prefills(self, requests: Sequence[Request]) -> list[int]:
        """Lengths of the prefills that lm-eval runs: one for all requests of one input."""
        if not self.logits_cache:
            return [self._input_length(request) for request in requests]
        inputs = {(*request[1], *request[2][:-1]) for request in requests}
        return [min(len(tokens), self.max_length) for tokens in inputs]

    def token_loglikelihoods(self, requests: Sequence[Instance]) -> list[list[float]]:
        """Every token's log-likelihood; see `sa_patch.evaluation.token_scores`.

        Raises:
            UserError: if a window is longer than the model's context, or its text is too short.
        """
        scores = []
        for window in [window_of(self, request) for request in requests]:
            question = ("token log-likelihoods", window)
            kept = self.full_answers if self.meter.saturated(len(window)) else None
            found: list[float] | None = kept.find(*question) if kept else None
            if found is not None:
                self.meter.add_reused([len(window)])
            else:
                self.meter.add([len(window)])
                found = score_window(self, window)
                if kept:
                    kept.add(found, *question)
            scores.append(found)
        return scores

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Greedy continuations: ``[batch, n + new]``, padded on the right.

        Args:
            context: ``[batch, n]``, padded on the left.
        """
        mask = options.get("attention_mask")
        lengths = [context.shape[1]] * len(context) if mask is None else padding_lengths(mask)
        new_tokens = max_length - context.shape[1]
        told = {name: options[name] for name in sorted(options.keys() - _NO_QUESTION)}
        questions = [
            self._generated_question(row[-length:].tolist(), new_tokens, stop, told, options)
            for row, length in zip(context, lengths, strict=True)
        ]
        known: dict[int, list[int]] = {}
        for index, question in enumerate(questions):
            found = self.full_answers.find(*question) if self.full_answers and question else None
            if found is not None:
                known[index] = found
        run = [index for index in range(len(context)) if index not in known]
        self.meter.add(lengths[index] for index in run)
        self.meter.add_reused(lengths[index] for index in known)
        written = dict(known)
        if run:
            if known and mask is not None:
                options["attention_mask"] = mask[run]
            with self.meter.clock.running():
                whole = super()._model_generate(
                    context[run] if known else context, max_length, stop, **options
                )
            for index, tokens in zip(run, whole[:, context.shape[1] :].tolist(), strict=True):
                written[index] = tokens
                if (question := questions[index]) and self.full_answers:
                    self.full_answers.add(tokens, *question)
            if not known:
                return whole
        longest = max(map(len, written.values()))
        rows = [
            written[index] + [self.tokenizer.pad_token_id] * (longest - len(written[index]))
            for index in range(len(context))
        ]
        new = torch.tensor(rows, dtype=context.dtype, device=context.device)
        return torch.cat([context, new], dim=1)

    def _generated_question(
        self,
        prompt: list[int],
        new_tokens: int,
        stop: list[str],
        told: dict[str, Any],
        options: dict[str, Any],
    ) -> tuple[Any, ...] | None:
        """What full attention would be asked; None where its answer would be another one."""
        drawn = options.get("do_sample") or (options.get("temperature") or 0) > 0
        plain = all(isinstance(value, bool | int | float | str | None) for value in told.values())
        if drawn or not plain or not self.generates_in_full:
            return None
        if self.full_answers is None or not self.meter.saturated(len(prompt)):
            return None
        return ("generation", prompt, new_tokens, list(stop), told)
