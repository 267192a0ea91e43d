"""Scores token by token, and the task that reads them by position."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from sa_patch import SA, SWA, Full
from sa_patch.errors import UserError
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.evaluation.tasks.catalogue import Catalogue
from sa_patch.files.packaged import tasks_dir
from tests.tiny_checkpoint import save_tiny_checkpoint

LENGTHS = (512, 1024, 2048, 4096, 8192)
BORDERS = (0, 512, 1024, 2048, 4096, 8192)
TEXT = "def window(position):\n    return [key for key in keys if key <= position]\n" * 9


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> SAPatchLM:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return SAPatchLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


def request(text: str, tokens: int) -> Instance:
    return Instance(request_type="token_loglikelihoods", doc={}, arguments=(text, tokens), idx=0)


@pytest.mark.parametrize("pattern", [Full(), SWA(7), SA(8, seed=1)])
@pytest.mark.parametrize("tokens", [1, 2, 300])  # 300 spans two chunks of rows
def test_each_token_has_the_score_that_lm_eval_gives_the_window_up_to_it(
    lm: SAPatchLM, pattern: Any, tokens: int
) -> None:
    lm.use_pattern(pattern)
    (scores,) = lm.token_loglikelihoods([request(TEXT, tokens)])
    window = lm.tok_encode(TEXT)[:tokens]
    assert len(scores) == tokens
    for start in {0, tokens // 2, tokens - 1}:
        parts = [lm.prefix_token_id, *window[:start]], window[start:]
        ((expected, _),) = lm._loglikelihood_tokens([(None, *parts)], disable_tqdm=True)
        assert sum(scores[start:]) == pytest.approx(expected, abs=1e-3)


def test_one_prefill_per_window_is_counted(lm: SAPatchLM) -> None:
    lm.use_pattern(SWA(7))
    lm.token_loglikelihoods([request(TEXT, 64), request(TEXT, 32)])
    summary = lm.meter.summary()
    assert (summary["sequences"], summary["tokens"]) == (2, 96)


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    [
        ("short", 64, r"only \d of the 64 tokens"),
        (TEXT, 4096, "longer than the model's context of 2048"),
    ],
)
def test_a_window_that_cannot_be_filled_is_refused_before_any_forward(
    lm: SAPatchLM, text: str, tokens: int, message: str
) -> None:
    lm.use_pattern(Full())
    with pytest.raises(UserError, match=message):
        lm.token_loglikelihoods([request(TEXT, 8), request(text, tokens)])
    assert lm.meter.summary()["sequences"] == 0


class Rising(LM):
    """Gives the token at position p the log-likelihood -p / 64."""

    def token_loglikelihoods(self, requests: list[Any]) -> list[list[float]]:
        return [[-place / 64 for place in range(each.args[1])] for each in requests]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise AssertionError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        raise AssertionError

    def generate_until(self, requests: list[Any]) -> list[Any]:
        raise AssertionError


def evaluate(name: str, model: LM, limit: int) -> dict[str, Any]:
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    results = simple_evaluate(
        model=model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=0
    )
    assert results is not None
    return {key.split(",")[0]: value for key, value in results["results"][name].items()}


@pytest.mark.parametrize("length", LENGTHS)
def test_buckets_hold_their_own_positions(length: int) -> None:
    found = evaluate(f"stdlib_position_{length}", Rising(), limit=2)
    mean = {
        f"perplexity_{start}_{end}": (start + end - 1) / 2
        for start, end in pairwise(BORDERS)
        if end <= length
    }
    mean["perplexity"] = (min(512, length // 2) + length - 1) / 2
    mean["perplexity_all"] = (length - 1) / 2
    scored = {key for key in found if key.startswith("perplexity") and "stderr" not in key}
    assert scored == set(mean)
    for key, expected in mean.items():
        assert math.log(found[key]) == pytest.approx(expected / 64)


@pytest.mark.parametrize("length", LENGTHS)
def test_documents_are_long_enough_and_share_no_text(length: int) -> None:
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    task = manager.load([f"stdlib_position_{length}"])["tasks"][f"stdlib_position_{length}"]
    docs = list(task.test_docs())
    assert len(docs) >= 30
    stdlib = Path(json.__file__).parents[1]
    assert docs[0]["text"].startswith(
        (stdlib / "argparse.py").read_text(encoding="utf-8")[: 4 * length]
    )
    for doc in docs:
        assert doc["tokens"] == length and len(doc["text"]) == 6 * length
    starts = [doc["text"][:400] for doc in docs]
    assert not any(start in doc["text"] for doc, start in zip(docs, starts[1:], strict=False))


@pytest.mark.parametrize("length", [4096, 8192])
def test_unseen_documents_are_cut_from_the_frozen_text(length: int) -> None:
    folder = tasks_dir() / "stdlib_perplexity"
    text = lzma.decompress((folder / "unseen.txt.xz").read_bytes()).decode()
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest in (folder / "unseen.py").read_text(encoding="utf-8")
    name = f"unseen_position_{length}"
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    docs = list(manager.load([name])["tasks"][name].test_docs())
    assert len(docs) == 10 * 8192 // length
    assert "".join(doc["text"] for doc in docs) == text
    assert {doc["tokens"] for doc in docs} == {length}
    info = Catalogue([name]).info(name)
    assert (info.primary_metric, info.chance) == ("perplexity", None)
    assert info.version == f"1.0+{digest[:12]}"


def test_the_model_runs_the_task_by_lm_eval(lm: SAPatchLM) -> None:
    lm.use_pattern(SWA(7))
    scores = evaluate("stdlib_position_1024", lm, limit=1)
    assert scores["perplexity"] == pytest.approx(scores["perplexity_512_1024"])
    assert scores["perplexity_all"] == pytest.approx(
        math.sqrt(scores["perplexity_0_512"] * scores["perplexity_512_1024"])
    )


def test_a_sweep_knows_the_task() -> None:
    info = Catalogue(["stdlib_position_4096"]).info("stdlib_position_4096")
    assert (info.primary_metric, info.chance) == ("perplexity", None)
    assert str(info.version).startswith("1.0+python")
    assert not info.generates
