"""passkey, multikey and vartrack (eval/tasks/long_context): documents, lengths and scores."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from sa_patch.evaluation.lm_eval_model import SAPatchLM
from sa_patch.evaluation.tasks.catalogue import Catalogue
from sa_patch.files.packaged import tasks_dir
from sa_patch.models.embedded import DEFAULT_MODEL, resolve_model
from sa_patch.models.loading import load_tokenizer
from sa_patch.report.recovery_items import RETRIEVAL, group_of, length_of

LENGTHS = (512, 1024, 2048, 4096, 8192)
CHOICES = {"recall_passkey": 10, "recall_multikey": 4, "recall_vartrack": 2}
NAMES = [f"{task}_{length}" for task in CHOICES for length in LENGTHS]
SHORT = [f"{task}_512" for task in CHOICES]
DEPTHS = range(5, 100, 10)
DIGESTS = {
    "recall_passkey_512": "2e609b7f2a5235f2",
    "recall_multikey_512": "a3e3d8e126258f31",
    "recall_vartrack_512": "e7371a3d2b662969",
}
# Arguments of a model reach a task's dataset function through lm-eval's metadata.
MODEL_ARGUMENTS = {"pretrained": "x", "seed": 7, "window": 3, "topk": 1, "layers": "0", "limit": 1}


@pytest.fixture(scope="module")
def tokens() -> Callable[[str], list[int]]:
    """The embedded model's tokenizer."""
    tokenizer = load_tokenizer(DEFAULT_MODEL, resolve_model(DEFAULT_MODEL))
    return lambda text: list(tokenizer.encode(text))


def load(name: str, metadata: dict[str, Any] | None = None) -> Any:
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


LOADED: dict[str, list[dict[str, Any]]] = {}


def documents(name: str) -> list[dict[str, Any]]:
    if name not in LOADED:
        LOADED[name] = [dict(doc) for doc in load(name).test_docs()]
    return LOADED[name]


def answer_of(doc: dict[str, Any]) -> str:
    return str(doc["choices"][doc["answer"]])


def split(doc: dict[str, Any]) -> tuple[str, str]:
    """The text and the question."""
    text, _, question = doc["prompt"].partition("\n")
    return text, question


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_answer_fill_their_length_and_never_pass_it(
    name: str, tokens: Callable[[str], list[int]]
) -> None:
    length = length_of(name)
    assert length is not None
    for doc in documents(name)[: 2 if length > 1024 else 20]:
        # One more for models that put a token first.
        whole = len(tokens(f"{doc['prompt']} {answer_of(doc)}")) + 1
        assert length - 20 <= whole <= length


@pytest.mark.parametrize("name", SHORT)
def test_choices_differ_in_their_last_token_alone(
    name: str, tokens: Callable[[str], list[int]]
) -> None:
    """All choices of a document are then scored in one forward pass."""
    for doc in documents(name):
        context = len(tokens(doc["prompt"]))
        coded = [tokens(f"{doc['prompt']} {choice}") for choice in doc["choices"]]
        assert len({tuple(ids[:-1]) for ids in coded}) == 1
        assert len({ids[-1] for ids in coded}) == len(coded)
        # A digit has a token for the space before it.
        assert len(coded[0]) == context + (1 if name == "recall_multikey_512" else 2)


@pytest.mark.parametrize("name", NAMES)
def test_each_ten_documents_have_ten_depths_and_answers_are_spread(name: str) -> None:
    docs = documents(name)
    assert len(docs) == len({doc["prompt"] for doc in docs}) == 100
    for start in range(0, 100, 10):
        found = sorted(round(100 * doc["depth"]) for doc in docs[start : start + 10])
        assert found == list(DEPTHS)
    count = CHOICES[name.rpartition("_")[0]]
    places = [doc["answer"] for doc in docs]
    assert all(len(set(doc["choices"])) == count for doc in docs)
    assert all(60 / count <= places.count(place) <= 150 / count for place in range(count))


@pytest.mark.parametrize("name", NAMES)
def test_the_fact_with_the_answer_stands_at_its_depth(name: str) -> None:
    for doc in documents(name)[:20]:
        text, _ = split(doc)
        (place,) = [found.start() for found in re.finditer(rf"\b{answer_of(doc)}\b", text)]
        # The facts themselves take room: up to a tenth of the shortest text.
        assert abs(place / len(text) - doc["depth"]) < 0.1 * 512 / (length_of(name) or 1) + 0.01


@pytest.mark.parametrize("length", LENGTHS)
def test_passkey_hides_one_number_and_pairs_digits_with_depths(length: int) -> None:
    docs = documents(f"recall_passkey_{length}")
    for doc in docs:
        assert re.findall(r"\d+", doc["prompt"]) == [answer_of(doc)]
        assert split(doc)[0].count(f"The pass key is {answer_of(doc)}.") == 1
        assert split(doc)[1].endswith("The pass key is")
    assert len({(answer_of(doc), doc["depth"]) for doc in docs}) == 100
    for start in range(0, 100, 10):
        assert len({answer_of(doc) for doc in docs[start : start + 10]}) == 10


@pytest.mark.parametrize("length", LENGTHS)
def test_multikey_asks_for_one_of_four_pass_words_and_offers_all(length: int) -> None:
    ranks = []
    for doc in documents(f"recall_multikey_{length}"):
        text, question = split(doc)
        words = dict(re.findall(r"The pass word of (\w+) is (\w+)\.", text))
        assert len(words) == 4
        assert sorted(words.values()) == sorted(doc["choices"])
        for word in words.values():
            assert len(re.findall(rf"\b{word}\b", doc["prompt"])) == 1
        asked = re.findall(r"pass word of (\w+)", question)
        assert len(set(asked)) == 1 and words[asked[0]] == answer_of(doc)
        ranks.append(list(words).index(asked[0]))
    assert all(ranks.count(rank) >= 20 for rank in range(4))


ASSIGNMENT = re.compile(r"The number of (\w+) is (the number of \w+|\w+)\.")


def follow(text: str, variable: str) -> str:
    """Evaluate assignments in order, as a reader would; the value of `variable`."""
    values: dict[str, str] = {}
    for name, source in ASSIGNMENT.findall(text):
        values[name] = values.get(source.split()[-1], source)
    return values[variable]


@pytest.mark.parametrize("length", LENGTHS)
def test_vartrack_asks_for_the_end_of_one_of_two_chains(length: int) -> None:
    firsts = []
    for doc in documents(f"recall_vartrack_{length}"):
        text, question = split(doc)
        links = dict(ASSIGNMENT.findall(text))
        assert len(links) == 4
        asked = re.findall(r"number of (\w+)", question)
        assert len(set(asked)) == 1
        # The variable asked for is given no value itself, only that of another.
        assert links[asked[0]].startswith("the number of ")
        assert follow(text, asked[0]) == answer_of(doc)
        ends = [name for name, source in links.items() if source.startswith("the number")]
        assert sorted(follow(text, end) for end in ends) == sorted(doc["choices"])
        assert sorted(re.findall(r"\d+", doc["prompt"])) == sorted(doc["choices"])
        firsts.append(ends[0] == asked[0])
    assert firsts.count(True) == 50


@pytest.mark.parametrize("name", SHORT)
def test_documents_are_the_same_on_every_machine_and_python(name: str) -> None:
    text = json.dumps(documents(name), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", SHORT)
def test_a_models_arguments_do_not_change_the_documents(name: str) -> None:
    given = [dict(doc) for doc in load(name, MODEL_ARGUMENTS).test_docs()]
    assert given == documents(name)


def test_tasks_describe_themselves_and_count_as_retrieval_at_their_length() -> None:
    catalogue = Catalogue([*NAMES, *CHOICES])
    for name in [*NAMES, *CHOICES]:
        info = catalogue.info(name)
        assert (info.primary_metric, info.version) == ("acc", 1.0)
        task = name if name in CHOICES else name.rpartition("_")[0]
        assert info.chance == 1 / CHOICES[task]
        assert not info.datasets
    assert {group_of(name, "acc,none") for name in NAMES} == {RETRIEVAL}


class Reader(LM):
    """Knows the answers of documents whose depth is at least `reach`, and no others."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        answers = []
        for request in requests:
            right = request.args[1].strip() == answer_of(request.doc)
            seen = round(100 * request.doc["depth"]) >= self.reach
            answers.append((0.0 if right == seen else -9.0, right))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise AssertionError

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise AssertionError


def evaluate(name: str, model: LM, limit: int) -> dict[str, Any]:
    manager = TaskManager(include_path=tasks_dir(), include_defaults=False)
    results = simple_evaluate(
        model=model, tasks=[name], task_manager=manager, limit=limit, bootstrap_iters=10
    )
    assert results is not None
    return dict(results["results"])


def test_lm_eval_scores_a_group() -> None:
    found = evaluate("recall_multikey", Reader(reach=50), limit=10)
    lengths = {
        name: found[name]["acc,none"] for name in NAMES if name.startswith("recall_multikey")
    }
    assert set(lengths.values()) == {0.5} and len(lengths) == 5
    assert found["recall_multikey"]["acc,none"] == 0.5


@pytest.mark.parametrize("name", SHORT)
def test_lm_eval_scores_each_depth(name: str) -> None:
    own = evaluate(name, Reader(reach=50), limit=20)[name]
    assert (own["acc,none"], own["sample_len"]) == (0.5, 20)
    by_depth = [own[f"acc_depth_{depth},none"] for depth in DEPTHS]
    assert by_depth == [0.0] * 5 + [1.0] * 5


def test_a_depth_that_the_limit_leaves_out_has_no_score() -> None:
    found = evaluate("recall_passkey_512", Reader(reach=0), limit=3)["recall_passkey_512"]
    known = {depth for depth in DEPTHS if not math.isnan(found[f"acc_depth_{depth},none"])}
    assert known == {5, 35, 65}


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> SAPatchLM:
    return SAPatchLM(pretrained=str(checkpoint), dtype="float32", method="full", batch_size=1)


@pytest.mark.parametrize("name", SHORT)
def test_the_model_runs_them_by_lm_eval(name: str, lm: SAPatchLM) -> None:
    found = evaluate(name, lm, limit=2)[name]
    assert found["acc,none"] in (0.0, 0.5, 1.0)
