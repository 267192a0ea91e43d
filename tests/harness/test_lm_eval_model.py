"""The lm-eval model: same scores at every batch size, and no silent mix of patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from sa_patch import SA, SWA, Full, MoBA
from sa_patch.errors import UserError
from sa_patch.harness.lm_eval_model import SAPatchLM
from sa_patch.patterns import Pattern

TEXTS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on", " the dog"),
    ("a", " b"),
    ("one two three four five six seven eight nine ten", " eleven"),
    ("question: is it so? answer:", " yes"),
    ("question: is it so? answer:", " no"),
    ("x" * 70, " " + "y" * 9),
]
PATTERNS = [Full(), SWA(5), SA(4), SA(3, circular=False, per_head=True), MoBA(4, 2)]


def requests(kind: str = "loglikelihood", **arguments: Any) -> list[Instance]:
    made = []
    for index, (context, continuation) in enumerate(TEXTS):
        args: tuple[Any, ...] = (context, continuation)
        if kind == "generate_until":
            args = (context, {"until": ["\n"], "max_gen_toks": 5, "do_sample": False})
        elif kind == "loglikelihood_rolling":
            args = (context + continuation,)
        made.append(Instance(request_type=kind, doc={}, arguments=args, idx=index, **arguments))
    return made


def answers(lm: Any, kind: str) -> list[Any]:
    result: list[Any] = getattr(lm, kind)(requests(kind), disable_tqdm=True)
    return result


def close(a: list[Any], b: list[Any]) -> bool:
    if isinstance(a[0], tuple):
        return [x[1] for x in a] == [x[1] for x in b] and close(
            [x[0] for x in a], [x[0] for x in b]
        )
    return bool(a == (pytest.approx(b, abs=1e-4) if isinstance(a[0], float) else b))


@pytest.fixture(scope="module")
def single(checkpoint: Path) -> SAPatchLM:
    return SAPatchLM(pretrained=str(checkpoint), batch_size=1, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def eights(checkpoint: Path) -> SAPatchLM:
    return SAPatchLM(pretrained=str(checkpoint), batch_size=8, dtype="float32", device="cpu")


KINDS = ["loglikelihood", "loglikelihood_rolling", "generate_until"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scores_do_not_depend_on_the_batch_size(
    single: SAPatchLM, eights: SAPatchLM, pattern: Pattern, kind: str
) -> None:
    single.use_pattern(pattern)
    eights.use_pattern(pattern)
    assert close(answers(single, kind), answers(eights, kind))
    assert single.meter.summary() == eights.meter.summary()


@pytest.mark.parametrize("kind", KINDS)
def test_full_equals_the_stock_model(checkpoint: Path, eights: SAPatchLM, kind: str) -> None:
    stock = HFLM(pretrained=str(checkpoint), batch_size=8, dtype="float32", device="cpu")
    eights.use_pattern(Full())
    ours = answers(eights, kind)
    assert close(ours, answers(stock, kind))
    eights.use_pattern(SWA(2))
    if kind != "generate_until":
        assert not close(ours, answers(eights, kind))


def test_meter_counts_what_enters_the_model(single: SAPatchLM) -> None:
    single.use_pattern(SA(4))
    answers(single, "loglikelihood")
    # The last token is only predicted.
    lengths = {len(single.tok_encode(c + k)) - 1 for c, k in TEXTS}
    assert set(single.meter.counts()) == lengths
    inputs = {tuple(single.tok_encode(c + k)[:-1]) for c, k in TEXTS}
    assert single.meter.summary()["sequences"] == len(inputs)


def test_requests_of_one_input_are_counted_once(single: SAPatchLM) -> None:
    single.use_pattern(SWA(4))
    pair = [
        Instance(request_type="loglikelihood", doc={}, arguments=("abc", f" {letter}"), idx=0)
        for letter in "xyz"
    ]
    single.loglikelihood(pair, disable_tqdm=True)
    assert single.meter.counts() == {len(single.tok_encode("abc x")) - 1: 1}


def test_arguments_reach_the_pattern(checkpoint: Path) -> None:
    lm = get_model("sa-patch")(
        pretrained=str(checkpoint), method="sa", window=16, seed=3, layers="0-1", decode="pattern"
    )
    assert lm.pattern == SA(16, seed=3)
    assert lm.get_model_info()["sa_patch_pattern"].startswith("sa:window=16,seed=3")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "saa", "window": 4}, "did you mean 'sa'"),
    "window": ({"method": "swa", "window": 0}, "at least 1"),
    "parameter": ({"method": "swa", "window": 4, "seed": 1}, "no parameter 'seed'"),
    "both": ({"pattern": "sa:window=4", "window": 4}, "not both"),
    "backend": ({"window": 4, "backend": "bandd"}, "did you mean 'banded'"),
    "layers": ({"window": 4, "layers": "one"}, "numbers and ranges"),
    "decode": ({"window": 4, "decode": "no"}, "decode must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_before_the_model_is_loaded(case: str, tmp_path: Path) -> None:
    arguments, says = BAD[case]
    with pytest.raises(UserError, match=says):
        SAPatchLM(pretrained=str(tmp_path / "never-looked-at"), **arguments)


def test_a_request_cache_serves_one_pattern_only(checkpoint: Path, tmp_path: Path) -> None:
    lm = SAPatchLM(pretrained=str(checkpoint), window=4, dtype="float32", device="cpu")
    cache = str(tmp_path / "cache.db")
    first = CachingLM(lm, cache).loglikelihood(requests())
    assert CachingLM(lm, cache).loglikelihood(requests()) == first
    with pytest.raises(UserError, match="--use_cache of its own"):
        lm.use_pattern(SWA(4))
    other = SAPatchLM(pretrained=str(checkpoint), window=8, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="sa:window=4,seed=0"):
        CachingLM(other, cache)


def test_a_cache_of_another_model_class_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.db")
    stock = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu")
    CachingLM(stock, cache).loglikelihood(requests())
    lm = SAPatchLM(pretrained=str(checkpoint), window=4, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="another model"):
        CachingLM(lm, cache)
