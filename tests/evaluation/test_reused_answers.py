"""Saturated prompts are answered by full attention once, and score as if they were run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from sa_patch.evaluation.full_answers import FullAnswers
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.patterns import SA, SWA, BlockTopK, Full, MoBA, Pattern, Sinks

WORDS = "the lighthouse keeper wrote the weather of every evening in a thick blue book "
# Saturated for the short requests and sparse for the long ones; SA(40) up to 79 tokens.
# Of the last one keys are counted where they are chosen.
PATTERNS = [SWA(60), SA(40), MoBA(20, 3), Sinks(4) | SWA(50), BlockTopK(4, 12)]
PATTERNS += [SWA(20) | MoBA(20, 3)]
TEXTS = [(WORDS * 9)[:length] for length in (20, 30, 31, 90, 400)]


@pytest.fixture
def lm(checkpoint: Path) -> Iterator[SAPatchLM]:
    yield SAPatchLM(str(checkpoint), method="full", dtype="float32", batch_size=1, device="cpu")


def log_likelihoods(lm: SAPatchLM) -> list[tuple[float, bool]]:
    requests = [
        Instance("loglikelihood", {}, (text, end), 0) for text in TEXTS for end in (" book", " sea")
    ]
    found: list[tuple[float, bool]] = lm.loglikelihood(requests, disable_tqdm=True)
    return found


def generated(lm: SAPatchLM) -> list[str]:
    options = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), 0) for text in TEXTS]
    found: list[str] = lm.generate_until(requests, disable_tqdm=True)
    return found


def windows(lm: SAPatchLM) -> list[list[float]]:
    requests = [Instance("token_loglikelihoods", {}, (TEXTS[-1], n), 0) for n in (30, 150)]
    return lm.token_loglikelihoods(requests)


@pytest.mark.parametrize("ask", [log_likelihoods, generated, windows])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_answers_and_figures_are_those_of_running_everything(
    lm: SAPatchLM, pattern: Pattern, ask: Any
) -> None:
    lm.use_pattern(pattern)
    expected, measured = ask(lm), lm.meter.summary()
    assert measured["reused_fraction"] == 0 < measured["saturated_fraction"] < 1
    lm.full_answers = FullAnswers({})
    lm.use_pattern(Full())
    full = ask(lm)
    lm.use_pattern(pattern)
    assert ask(lm) == expected != full
    reused = lm.meter.summary()
    assert reused["reused_fraction"] == pytest.approx(measured["saturated_fraction"])
    for figures in (measured, reused):
        for name in (
            "reused_fraction",
            "model_seconds",
            "visited_keys",
            "full_visited_keys",
            "choosing_keys",
        ):
            figures.pop(name)
    assert reused.pop("prompt_lengths") == measured.pop("prompt_lengths")
    assert reused == pytest.approx(measured)


def test_any_saturated_pattern_answers_for_full_attention(lm: SAPatchLM) -> None:
    expected = log_likelihoods(lm)
    lm.full_answers = FullAnswers({})
    lm.use_pattern(SA(4000))
    assert log_likelihoods(lm) == expected
    lm.use_pattern(Full())
    assert log_likelihoods(lm) == expected
    assert lm.meter.summary()["reused_fraction"] == 1


@pytest.mark.parametrize("ask", [log_likelihoods, generated, windows])
def test_what_a_sparse_pattern_answers_is_nobody_elses(lm: SAPatchLM, ask: Any) -> None:
    expected = ask(lm)
    lm.full_answers = FullAnswers({})
    lm.use_pattern(SWA(4))
    ask(lm)
    lm.use_pattern(Full())
    assert ask(lm) == expected


def test_batches_of_generations_are_filled_up_with_what_is_known(checkpoint: Path) -> None:
    lm = SAPatchLM(str(checkpoint), method="full", dtype="float32", batch_size=8, device="cpu")
    lm.use_pattern(SWA(60))
    expected = generated(lm)
    lm.full_answers = FullAnswers({})
    lm.use_pattern(SWA(60))
    assert generated(lm) == expected
    assert lm.meter.summary()["reused_fraction"] == 0
    lm.use_pattern(Sinks(1) | SWA(59))
    other = generated(lm)
    assert 0 < lm.meter.summary()["reused_fraction"] < 1
    assert other[:3] == expected[:3]


def test_what_full_attention_would_not_generate_is_run(lm: SAPatchLM) -> None:
    lm.full_answers = FullAnswers({})
    generated(lm)
    lm.use_pattern(SWA(60), decode="pattern")
    generated(lm)
    assert lm.meter.summary()["reused_fraction"] == 0


def test_layers_that_are_sparse_decide(lm: SAPatchLM) -> None:
    lm.full_answers = FullAnswers({})
    log_likelihoods(lm)
    lm.use_pattern(Full(), layers={"0": "swa:4"})
    log_likelihoods(lm)
    assert lm.meter.summary()["reused_fraction"] == 0


def test_files_are_read_whole_by_others_of_the_same_identity(tmp_path: Path) -> None:
    first = FullAnswers({"model": "a"}, tmp_path)
    first.add([-1.5, True], "log-likelihood", [1, 2], [3])
    first.save("cell")
    (file,) = tmp_path.iterdir()
    second, other = FullAnswers({"model": "a"}, tmp_path), FullAnswers({"model": "b"}, tmp_path)
    for answers in (second, other):
        answers.refresh()
    assert second.find("log-likelihood", [1, 2], [3]) == [-1.5, True]
    assert second.find("log-likelihood", [1], [2, 3]) is None
    assert other.find("log-likelihood", [1, 2], [3]) is None
    # Nothing new, nothing written.
    second.save("later")
    assert list(tmp_path.iterdir()) == [file]
    foreign = json.dumps(json.loads(file.read_text()) | {"identity": {"model": "b"}})
    for damage in (file.read_text()[:-9], "[]", '{"identity": {"model": "a"}}', foreign):
        file.write_text(damage)
        third = FullAnswers({"model": "a"}, tmp_path)
        third.refresh()
        assert third.find("log-likelihood", [1, 2], [3]) is None


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    answers = FullAnswers({}, tmp_path / "elsewhere")
    answers.add([0.0, False], "x")
    answers.save("cell")
    assert answers.find("x") == [0.0, False] and not list(tmp_path.iterdir())
