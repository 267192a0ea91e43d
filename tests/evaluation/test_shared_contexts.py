"""Answers of a question are read behind its context, and score as if each were read with it.

Seen red when a padded answer moved its positions, a context's padding was seen, and answers went to
other questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.evaluation.shared_contexts import SharedContextsLM, caches_keys_alone
from sa_patch.patterns import PSA, SA, SWA, Full, MoBA, Pattern, Sinks, XAttention
from tests.patching.families import FAMILIES, build

WORDS = "the lighthouse keeper wrote the weather of every evening in a thick blue book "
# Three contexts of about one length, in one batch, and a longer one.
CONTEXTS = [(WORDS * 9)[:length] for length in (150, 141, 133, 400)]
ENDS = (" of the sea", " and", " in a storm from the west", " of", " of the")
PATTERNS = [Full(), SWA(20), Sinks(4) | SWA(30), MoBA(16, 2), PSA(25)]


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> Iterator[SAPatchLM]:
    yield SAPatchLM(str(checkpoint), method="full", dtype="float32", batch_size=16, device="cpu")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions each batch held."""
    held: list[int] = []
    original = SharedContextsLM._answer

    def answer(self: Any, requests: Any, questions: Any) -> Any:
        held.append(len(questions))
        return original(self, requests, questions)

    monkeypatch.setattr(SharedContextsLM, "_answer", answer)
    return held


def ask(lm: SAPatchLM, ends: tuple[str, ...] = ENDS) -> list[tuple[float, bool]]:
    pairs = [(text, end) for end in ends for text in CONTEXTS]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return found


@pytest.mark.parametrize("decode", ["full", "pattern"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores_and_figures_are_those_of_reading_each_by_itself(
    lm: SAPatchLM, pattern: Pattern, decode: str, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.use_pattern(pattern, decode=decode)
    shared, measured = ask(lm), lm.meter.summary()
    assert sorted(read) == [1, 3]
    monkeypatch.setattr(lm, "share_contexts", False)
    lm.meter.reset()
    alone, expected = ask(lm), lm.meter.summary()
    assert len(read) == 2
    assert [score for score, _ in shared] == pytest.approx([one for one, _ in alone], abs=2e-4)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in alone]
    for changing in ("model_seconds", "visited_keys"):
        measured.pop(changing), expected.pop(changing)
    assert measured == expected


def test_a_single_token_behind_a_context_is_no_generated_one(
    lm: SAPatchLM, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.use_pattern(SWA(20), decode="full")
    shared = ask(lm, ("QX", "ZY", "!?"))
    assert sum(read) == 4
    monkeypatch.setattr(lm, "share_contexts", False)
    alone = ask(lm, ("QX", "ZY", "!?"))
    assert [score for score, _ in shared] == pytest.approx([one for one, _ in alone], abs=2e-4)


def test_what_cannot_be_shared_is_not(
    lm: SAPatchLM, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last counts its keys where they are chosen, in whole prompts.
    for pattern in (SA(20), XAttention(16, 3), SWA(20) | MoBA(16, 2)):
        lm.use_pattern(pattern)
        ask(lm)
        assert read == []
    lm.use_pattern(SWA(20))
    monkeypatch.setattr(lm, "batch_size_per_gpu", 1)
    ask(lm)
    assert read == []


@pytest.mark.parametrize("family, shares", [("llama", True), ("lfm2", False), ("jamba", False)])
def test_only_keys_are_kept_for_several_answers(family: str, shares: bool) -> None:
    assert caches_keys_alone(build(family, FAMILIES[family])) is shares


def test_batches_keep_to_a_number_of_answers_and_of_tokens(
    lm: SAPatchLM, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.use_pattern(SWA(20))
    monkeypatch.setattr(lm, "batch_size_per_gpu", 11)
    ask(lm)
    assert sorted(read) == [1, 1, 2]
    read.clear()
    monkeypatch.setattr(lm, "batch_tokens", 400)
    ask(lm)
    assert read == [1, 1, 1]  # the longest is larger than a batch


def test_a_question_larger_than_a_batch_is_read_answer_by_answer(
    lm: SAPatchLM, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.use_pattern(SWA(20))
    expected = ask(lm)
    for name, value in (("batch_size_per_gpu", len(ENDS) - 1), ("batch_tokens", 100)):
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(lm, name, value)
            found = ask(lm)
        assert read == []
        assert [one for _, one in found] == [one for _, one in expected]
        assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)


def test_logits_are_asked_from_the_first_answer_on(
    lm: SAPatchLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    original = SAPatchLM._model_call

    def call(self: Any, inps: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        logits = original(self, inps, *arguments, **named)
        shapes.append((inps.shape[1], logits.shape[1]))
        return logits

    monkeypatch.setattr(SAPatchLM, "_model_call", call)
    monkeypatch.setattr(lm, "batch_tokens", 10_000)  # like lengths share a batch
    lm.use_pattern(SA(20))
    ask(lm)
    assert len(shapes) > 1 and all(0 < asked <= n / 4 for n, asked in shapes)
