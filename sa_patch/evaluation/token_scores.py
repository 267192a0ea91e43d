"""Log-likelihood of every token of one window, from one prefill.

lm-eval's own requests give one number per continuation, so a score by position would need a prefill
for each stretch of positions. The lm-eval model `sa-patch` therefore answers one more kind of
request, `token_loglikelihoods`, whose arguments are a text and a number of tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sa_patch.errors import UserError

REQUEST_TYPE = "token_loglikelihoods"
# Rows of logits that are turned into probabilities at once: a copy of all would double the memory.
ROWS_AT_ONCE = 256


class CausalLM(Protocol):
    """What is needed of an lm-eval model (`lm_eval.models.huggingface.HFLM` has it all)."""

    @property
    def max_length(self) -> int: ...

    @property
    def prefix_token_id(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def tok_encode(self, string: str, /) -> list[int]: ...

    def _model_call(self, inps: Tensor, /) -> Tensor: ...


class Request(Protocol):
    """An lm-eval `Instance` of the type `token_loglikelihoods`; `args` is (text, tokens)."""

    @property
    def args(self) -> tuple[str, int]: ...


def window_of(lm: CausalLM, request: Request) -> list[int]:
    """The first `tokens` tokens of a request's `text`.

    Raises:
        UserError: if they are more than the model's context, or the text is too short.
    """
    text, tokens = request.args
    if tokens > lm.max_length:
        raise UserError(
            f"a window of {tokens} tokens is longer than the model's context of {lm.max_length}; "
            "choose a shorter variant of the task or a model with a longer context"
        )
    window = lm.tok_encode(text)
    # Some tokenizers put the prefix token first themselves.
    if window[:1] == [lm.prefix_token_id]:
        window = window[1:]
    if len(window) < tokens:
        raise UserError(
            f"a document has only {len(window)} of the {tokens} tokens that its task asks for; "
            "this tokenizer needs a task with longer documents"
        )
    return window[:tokens]


def score_window(lm: CausalLM, window: list[int]) -> list[float]:
    """The natural-log likelihood of every token of a window, from one prefill without padding.

    The model reads its prefix token and all tokens but the last, as in lm-eval's rolling
    log-likelihood: entry i is predicted by the query at position i, which has i + 1 keys before
    or at it.
    """
    tokens = torch.tensor([[lm.prefix_token_id, *window]], device=lm.device)
    logits = lm._model_call(tokens[:, :-1])[0]
    targets = tokens[0, 1:].to(logits.device)
    found = [
        rows.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0].cpu()
        for rows, wanted in zip(
            logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True
        )
    ]
    scores: list[float] = torch.cat(found).tolist()
    return scores
