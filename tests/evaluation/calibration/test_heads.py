"""Which heads look at the answer that is asked for."""

from __future__ import annotations

import pytest
import torch

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document
from sa_patch.evaluation.calibration.heads import (
    full_heads,
    hidden_answers,
    layers_by_head,
    retrieval_scores,
)
from sa_patch.patterns import SWA, ByHead, Full
from tests.small_models import tiny_model

# Two answers, of two tokens and of one; the second hides nowhere.
DOCUMENT = Document("recall", (3, 7, 8, 4, 5, 9, 7, 8, 2, 6), (6, 7, 9))


def test_answers_are_found_where_they_are_hidden() -> None:
    assert hidden_answers(DOCUMENT) == ([5, 6], [1, 2])


def test_scores_are_the_attention_of_queries_that_name_answers() -> None:
    model = tiny_model("llama")
    found = retrieval_scores(model, [DOCUMENT])
    model.set_attn_implementation("eager")
    weights = model(torch.tensor([DOCUMENT.tokens]), output_attentions=True).attentions
    for layer, own in enumerate(weights):
        mean = (own[0, :, 5, 1] + own[0, :, 6, 2]) / 2
        expected = mean.unflatten(0, (len(found[layer]), -1)).amax(1)
        assert found[layer].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_highest_scores_stay_full() -> None:
    scores = {0: torch.tensor([0.1, 0.4]), 2: torch.tensor([0.1, 0.0]), 3: torch.tensor([0.5, 0.3])}
    assert full_heads(scores, 4) == [(3, 0), (0, 1), (3, 1), (0, 0)]
    found = layers_by_head(scores, [(3, 0), (3, 1), (0, 1)], SWA(4))
    assert found == {0: ByHead((SWA(4), Full())), 2: SWA(4), 3: Full()}


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="from 1 to 1"):
        full_heads({0: torch.zeros(2)}, 2)
    with pytest.raises(UserError, match="hides the answers"):
        retrieval_scores(tiny_model("llama"), [Document("text", (1, 2, 3), (2,))])
