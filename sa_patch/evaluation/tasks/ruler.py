"""RULER: tasks of lm-eval whose documents are made for a length, by the model's own tokenizer.

Source: Hsieh et al., RULER (arXiv 2404.06654). lm-eval names its scores by length ("4096"); here
each length is a task of its own, and the score is called what it is: the share of the expected
strings that the answer holds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sa_patch.errors import UserError, one_line
from sa_patch.evaluation.tasks.benchmarks import working_directory
from sa_patch.models.quiet_output import silenced

METRIC = "string_match"
DEFAULT_LENGTH = 4096
# Below, the worked example that some prompts begin with (up to 500 tokens) leaves no room, and
# lm-eval would try for ever.
LEAST_LENGTH = 1024
DEPTHS = tuple(range(5, 100, 10))
# Of which essays the haystacks are, and which files the questions are in.
ESSAYS = "baber/paul_graham_essays"
WITH_ESSAYS = (
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multiquery",
)
QUESTIONS = {
    "ruler_qa_squad": ("ruler/squad", "dev-v2.0.json"),
    "ruler_qa_hotpot": ("ruler/hotpotqa", "hotpot_dev_distractor_v1.json"),
}
_PACKAGE = "lm_eval.tasks.ruler"


def makes_documents(config: Mapping[str, Any]) -> bool:
    """Whether lm-eval makes a task's documents by a function, which may need a tokenizer."""
    return f"{os.sep}lm_eval{os.sep}tasks{os.sep}" in str(config.get("custom_dataset") or "")


def is_ruler(config: Mapping[str, Any]) -> bool:
    """Whether a task's configuration, its functions not resolved, is one of RULER's."""
    return f"{os.sep}tasks{os.sep}ruler{os.sep}" in str(config.get("custom_dataset") or "")


def datasets(name: str) -> tuple[str, ...]:
    """What a task reads from the hub, or from a folder of local copies."""
    if name in WITH_ESSAYS:
        return (ESSAYS,)
    return QUESTIONS[name][:1] if name in QUESTIONS else ()


def check_length(length: Any) -> None:
    """Raise a UserError unless documents of so many tokens can be made."""
    if isinstance(length, bool) or not isinstance(length, int) or length < LEAST_LENGTH:
        raise UserError(
            f"RULER's max_seq_lengths are whole numbers of at least {LEAST_LENGTH}, for example "
            f"[1024, 4096], got {length!r}"
        )


def check_inputs(name: str, benchmarks: Path | None) -> None:
    """Find what a task's documents are made from; what is found is kept for making them.

    Raises:
        UserError: if the essays or the questions are missing, and where they belong.
    """
    if not datasets(name):
        return
    where = f"DIR/{datasets(name)[0]}"
    try:
        with silenced(), _reading(benchmarks):
            if name in WITH_ESSAYS:
                _utils("prepare_niah").get_haystack("essay")
            else:
                _read_questions(name)
    except Exception as error:
        what = "essays" if name in WITH_ESSAYS else f"questions ({QUESTIONS[name][1]})"
        raise UserError(
            f"task {name!r} reads {what} that cannot be had from here "
            f"({one_line(error)[:120]}); put them at {where}, and give `sa-patch sweep "
            "--benchmarks DIR` or run lm-eval in DIR, or leave the task out"
        ) from error
    if name in WITH_ESSAYS:
        _require_splitter(name)


def _require_splitter(name: str) -> None:
    """NLTK's sentence splitter, which only the essays need; fetched where there is a network."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        with silenced():
            fetched = nltk.download("punkt_tab")
        if not fetched:
            raise UserError(
                f"task {name!r} splits its essays with NLTK's punkt_tab, which cannot be fetched "
                "from here; unpack it at ~/nltk_data/tokenizers/punkt_tab, or leave the task out"
            ) from None


def _read_questions(name: str) -> None:
    questions = _utils("qa_utils")
    questions.read_squad() if name == "ruler_qa_squad" else questions.read_hotpotqa()


@contextlib.contextmanager
def making_documents(benchmarks: Path | None) -> Iterator[None]:
    """The state in which documents come out the same every time, whatever was made before.

    lm-eval draws them from the global random state, as its command seeds it, and RULER's common
    words from a generator that lives as long as their module.
    """
    states = random.getstate(), np.random.get_state()
    sys.modules.pop(f"{_PACKAGE}.cwe_utils", None)
    random.seed(0)
    np.random.seed(1234)
    try:
        with _reading(benchmarks):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _reading(benchmarks: Path | None) -> Iterator[None]:
    """Read essays and questions below `benchmarks`, and try no download that is not needed."""
    before = os.environ.get("LOCAL_RANK")
    # lm-eval fetches NLTK's splitter when it is first imported, but by the first process alone.
    os.environ["LOCAL_RANK"] = "1"
    try:
        with working_directory(benchmarks), _reading_questions(benchmarks):
            yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@contextlib.contextmanager
def _reading_questions(benchmarks: Path | None) -> Iterator[None]:
    """Have lm-eval read the files of questions that lie below `benchmarks`, if any do."""
    places = {} if benchmarks is None else {f: benchmarks / d / f for d, f in QUESTIONS.values()}
    if not any(place.is_file() for place in places.values()):
        yield
        return
    utils = _utils("qa_utils")
    download = utils.download_json

    def read(url: str) -> Any:
        return json.loads(places[url.rsplit("/", 1)[1]].read_text(encoding="utf-8"))

    utils.download_json = read
    utils.read_squad.cache_clear()
    utils.read_hotpotqa.cache_clear()
    try:
        yield
    finally:
        utils.download_json = download


def _utils(module: str) -> Any:
    """One of RULER's modules, the very one that lm-eval's task files use."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import _load_module_with_cache

    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    return _load_module_with_cache(folder / f"{module}.py")


def scores(name: str, length: int, original: Callable[..., Mapping[str, float]]) -> dict[str, Any]:
    """What lm-eval's configuration of a task is changed to, so that its scores have plain names.

    Args:
        original: the task's own function from a document and its answers to scores by length.
    """
    depths = [f"acc_depth_{depth}" for depth in DEPTHS] if name.startswith("niah_") else []

    def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float | None]:
        score = original(doc, results)[str(length)]
        own = f"acc_depth_{depth}" if (depth := needle_depth(doc)) is not None else None
        return {METRIC: score, **{key: score if key == own else None for key in depths}}

    return {
        "process_results": process_results,
        "metric_list": [
            {"metric": METRIC, "aggregation": "mean", "higher_is_better": True},
            *(
                {"metric": key, "aggregation": _mean_of_known, "higher_is_better": True}
                for key in depths
            ),
        ],
    }


def needle_depth(doc: Mapping[str, Any]) -> int | None:
    """The middle of the tenth of the text, in %, that holds a document's only needle."""
    if len(doc["outputs"]) != 1 or not doc["input"]:
        return None
    place = doc["input"].find(doc["outputs"][0])
    return None if place < 0 else DEPTHS[len(DEPTHS) * place // len(doc["input"])]


def _mean_of_known(values: Sequence[float | None]) -> float:
    """NaN where the limit leaves a depth without documents."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
