"""The lm-eval model: same scores at every batch size, and no silent mix of patterns."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval._cli.utils import MergeDictAction
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForCausalLM

from sa_patch import PSA, SA, SWA, BlockTopK, Full, MoBA, Sinks, register_implementation
from sa_patch.errors import UserError
from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.kernels import Spans
from sa_patch.patching import layer_patterns
from sa_patch.patterns import Pattern
from tests.tiny_checkpoint import save_tiny_checkpoint

TEXTS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on", " the dog"),
    ("a", " b"),
    ("one two three four five six seven eight nine ten", " eleven"),
    ("question: is it so? answer:", " yes"),
    ("question: is it so? answer:", " no"),
    ("x" * 70, " " + "y" * 9),
]
PATTERNS = [
    Full(),
    SWA(5),
    SA(4),
    SA(3, circular=False, per_head=True),
    MoBA(4, 2),
    PSA(5),
    Sinks(1) | SWA(3) | SA(3),
    SWA(3) | MoBA(2, 3),
    BlockTopK(2, 2, 1, 2),
]


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
    one, eight = single.meter.summary(), eights.meter.summary()
    assert one.pop("prompt_lengths") == eight.pop("prompt_lengths")
    assert min(one.pop("model_seconds"), eight.pop("model_seconds")) > 0
    for name in ("visited_keys", "full_visited_keys"):
        # What is chosen is sampled from the first rows of batches.
        rel = 0.2 if pattern.reads_content else 1e-6
        assert one.pop(name) == pytest.approx(eight.pop(name), rel=rel)
    assert one == pytest.approx(eight)


def test_lm_evals_own_model_takes_a_registered_name(checkpoint: Path, single: SAPatchLM) -> None:
    register_implementation("lm-eval-sa-4", SA(4))
    named = HFLM(
        pretrained=str(checkpoint),
        attn_implementation="lm-eval-sa-4",
        batch_size=1,
        dtype="float32",
        device="cpu",
    )
    single.use_pattern(SA(4))
    assert close(answers(named, "loglikelihood"), answers(single, "loglikelihood"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_batches_limited_by_tokens_score_the_same(
    checkpoint: Path, single: SAPatchLM, pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = SAPatchLM(
        pretrained=str(checkpoint), batch_size=8, batch_tokens=64, dtype="float32", device="cpu"
    )
    sizes: list[tuple[int, int]] = []
    call = limited._model_call

    def watched(tokens: Tensor, **named: Any) -> Tensor:
        sizes.append((tokens.shape[0], tokens.shape[1]))
        return call(tokens, **named)

    monkeypatch.setattr(limited, "_model_call", watched)
    single.use_pattern(pattern)
    limited.use_pattern(pattern)
    assert close(answers(single, "loglikelihood"), answers(limited, "loglikelihood"))
    assert all(rows == 1 or rows * tokens <= 64 for rows, tokens in sizes)
    assert limited.batch_size == 8


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


def test_layers_with_a_window_of_their_own_are_counted_as_that(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    own: dict[str, Any] = {"sliding_window": 8, "use_sliding_window": True, "layer_types": kinds}
    folder = save_tiny_checkpoint(tmp_path, "qwen3", **own)
    lm = SAPatchLM(pretrained=str(folder), method="swa", window=4, dtype="float32")
    lm.meter.add([40])
    windowed, sparse, n = (sum(min(i, w) for i in range(1, 41)) for w in (8, 4, 40))
    found = lm.meter.summary()
    share = found["attention_flops"] / found["full_attention_flops"]
    assert share == pytest.approx((windowed + sparse) / (windowed + n))


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


def test_a_seed_beside_a_pattern_is_that_of_all_its_random_parts(checkpoint: Path) -> None:
    lm = SAPatchLM(str(checkpoint), pattern="sinks:4+swa:6+sa:8", seed=3)
    assert lm.pattern == Sinks(4) | SWA(6) | SA(8, seed=3)


MODEL_ARGS: dict[str, Pattern] = {
    "pattern=sinks:4+swa:6+psa:8,seed=2": Sinks(4) | SWA(6) | PSA(8, seed=2),
    "pattern=swa:6+moba:block_size=4;topk=3": SWA(6) | MoBA(4, 3),
    "method=sinks:4+swa:6": Sinks(4) | SWA(6),
    "pattern=moba,block_size=4,topk=3": MoBA(4, 3),
    "pattern=sa:window=4;seed=1;circular=false": SA(4, seed=1, circular=False),
    "method=block_topk,topk=3,block_size=2,sinks=1,local=4,branch=4,beam=5,grouped=true": BlockTopK(
        2, 3, 1, 4, 4, 5, True
    ),
    '{"pattern": "block_topk:block_size=2,topk=3,local=4"}': BlockTopK(2, 3, 4, 4),
    "pattern='moba:block_size=4,topk=3'": MoBA(4, 3),
}


@pytest.mark.parametrize("text", MODEL_ARGS)
def test_every_parameter_can_be_given_in_model_args(checkpoint: Path, text: str) -> None:
    """As lm-eval's own command line reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_args", nargs="+", action=MergeDictAction)
    given = parser.parse_args(["--model_args", text]).model_args
    lm = get_model("sa-patch").create_from_arg_obj({"pretrained": str(checkpoint), **given})
    assert lm.pattern == MODEL_ARGS[text]


def test_layers_are_text_a_mapping_or_a_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("layers: {0+2: full}")
    for layers in ("1", {"0+2": "full"}, {0: None, 2: "full"}, str(path)):
        lm = SAPatchLM(str(checkpoint), pattern="swa:4", layers=layers)
        assert layer_patterns(lm.model) == {0: None, 1: SWA(4), 2: None}
        lm.meter.add([10])
        assert lm.meter.summary()["mean_keys_per_query"] == pytest.approx((34 + 2 * 55) / 30)


def test_one_layer_with_a_drawn_pattern_has_padding_masked_in_all_batches(
    single: SAPatchLM, eights: SAPatchLM
) -> None:
    for lm in (single, eights):
        lm.use_pattern(SWA(4), layers={1: SA(3)})
    assert close(answers(single, "loglikelihood"), answers(eights, "loglikelihood"))


@pytest.mark.parametrize("batch_tokens", [None, 1000], ids=["", "batch_tokens"])
@pytest.mark.parametrize("zeros", [False, True], ids=["told apart", "differ in zeros alone"])
def test_rows_of_any_length_share_a_batch_of_a_drawn_pattern(
    single: SAPatchLM,
    eights: SAPatchLM,
    monkeypatch: pytest.MonkeyPatch,
    zeros: bool,
    batch_tokens: int | None,
) -> None:
    """A token 0 at an input's end looks like padding; the last token of a request never enters."""
    requests: list[Any] = [(None, [5, 6, 7, 0], [8]), (None, [5, 6, 7, 0, 0, 9], [8, 0])]
    requests += [(None, list(range(9, 9 + n)), [3, 4]) for n in (3, 11, 12, 20)]
    requests += [(None, [5, 6, 7], [8])] if zeros else []
    for lm in (single, eights):
        lm.use_pattern(SA(3))
    monkeypatch.setattr(eights, "batch_tokens", batch_tokens)
    expected = single._loglikelihood_tokens(requests, disable_tqdm=True)
    batches: list[int] = []
    forward = eights.model.forward

    def watched(tokens: Tensor, **named: Any) -> Any:
        batches.append(len(tokens))
        return forward(tokens, **named)

    monkeypatch.setattr(eights.model, "forward", watched)
    assert close(eights._loglikelihood_tokens(requests, disable_tqdm=True), expected)
    if zeros:
        assert batches == [1, 1, 1, 1, 2, 1]
    else:
        # Rows of similar lengths where a number of tokens is to be filled up.
        assert batches == ([6] if batch_tokens is None else [1, 2, 1, 2])


def test_keys_are_counted_where_they_are_chosen(single: SAPatchLM) -> None:
    """Chosen blocks that lie within the window count once: the pattern alone would count twice."""
    single.use_pattern(SWA(6) | MoBA(2, 3))
    answers(single, "loglikelihood")
    together = single.meter.summary()["mean_keys_per_query"]
    single.use_pattern(SWA(6))
    answers(single, "loglikelihood")
    window = single.meter.summary()["mean_keys_per_query"]
    assert window < together < window + 5


def test_trials_of_batch_sizes_do_not_enter_the_measurements(checkpoint: Path) -> None:
    lm = SAPatchLM(str(checkpoint), pattern=SWA(4) | MoBA(2, 3), batch_size="auto", max_length=64)
    seen: list[int] = []
    observe = lm.meter.observe

    def watch(layer: int, q: Tensor, k: Tensor, spans: Spans) -> None:
        seen.extend(spans.lengths)
        observe(layer, q, k, spans)

    lm.meter.observe = watch  # type: ignore[method-assign]
    answers(lm, "loglikelihood")
    assert Counter(seen) == {n: 3 * times for n, times in lm.meter.counts().items()}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "saa", "window": 4}, "did you mean 'sa'"),
    "window": ({"method": "swa", "window": 0}, "at least 1"),
    "parameter": ({"method": "swa", "window": 4, "seed": 1}, "no parameter 'seed'"),
    "not random": ({"pattern": "sinks:4+swa:4", "seed": 1}, "draws nothing at random"),
    "no file": ({"window": 4, "layers": "no.yaml"}, "no schedule file"),
    "separators": ({"pattern": "moba:block_size=4", "topk": 3}, "separated by semicolons"),
    "parameters twice": ({"pattern": "sa:window=4", "window": 4}, "has its parameters already"),
    "both words": ({"pattern": "sa:window=4", "method": "sa"}, "give one of them"),
    "backend": ({"window": 4, "backend": "bandd"}, "did you mean 'banded'"),
    "layers": ({"window": 4, "layers": "one"}, "numbers and ranges"),
    "decode": ({"window": 4, "decode": "no"}, "decode must be"),
    "tokens": ({"window": 4, "batch_tokens": 9, "batch_size": "auto"}, "give batch_size a number"),
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
    for change in ({"dtype": "bfloat16"}, {"add_bos_token": True}, {"backend": "reference"}):
        settings: dict[str, Any] = {"window": 4, "dtype": "float32", "device": "cpu", **change}
        with pytest.raises(UserError, match="--use_cache of its own"):
            CachingLM(SAPatchLM(pretrained=str(checkpoint), **settings), cache)


def test_a_cache_tells_model_objects_apart_by_their_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    settings: dict[str, Any] = {"tokenizer": str(checkpoint), "window": 4}
    cache = str(tmp_path / "cache.db")
    CachingLM(SAPatchLM(model, **settings), cache).loglikelihood(requests())
    CachingLM(SAPatchLM(model, **settings), cache)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(UserError, match="--use_cache of its own"):
        CachingLM(SAPatchLM(model, **settings), cache)


def test_a_cache_of_another_model_class_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.db")
    stock = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu")
    CachingLM(stock, cache).loglikelihood(requests())
    lm = SAPatchLM(pretrained=str(checkpoint), window=4, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="another model"):
        CachingLM(lm, cache)
