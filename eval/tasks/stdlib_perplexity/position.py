"""Perplexity by position: every token of a window is scored, from one prefill."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from sa_patch.evaluation.token_scores import REQUEST_TYPE

# Positions before this one (in shorter windows: the first half) are left out of the main score: a
# few hundred keys still hold nearly all of their past, so they say little about long context.
FIRST_SCORED = 512
BORDERS = (0, 512, 1024, 2048, 4096, 8192)


def scores(doc: dict[str, Any], results: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean log-likelihood per token: of later positions, of all, and by bucket of positions."""
    (tokens,) = results
    found = {
        "perplexity": statistics.fmean(tokens[min(FIRST_SCORED, len(tokens) // 2) :]),
        "perplexity_all": statistics.fmean(tokens),
    }
    for start, end in pairwise(BORDERS):
        if end <= len(tokens):
            found[f"perplexity_{start}_{end}"] = statistics.fmean(tokens[start:end])
    return found


class PositionPerplexity(ConfigurableTask):
    """A task whose only request per document asks for the log-likelihood of every token.

    Only lm-eval models that answer `token_loglikelihoods` can run it; `sa-patch` does.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """One request: the document's text, and how many tokens of it to score."""
        return [
            Instance(
                request_type=REQUEST_TYPE,
                doc=doc,
                arguments=(doc["text"], doc["tokens"]),
                idx=0,
                metadata=kwargs.get("metadata", (None, None, None)),
            )
        ]
