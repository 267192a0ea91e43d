"""Our own lm-eval tasks (eval/tasks): same documents everywhere, right lengths, right scores."""

import hashlib
import json
import math
import platform
import re
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parents[2] / "eval" / "tasks"
NEEDLES = {f"needle_{length}": length for length in (128, 256, 512, 1024)}
PERPLEXITIES = {
    "stdlib_perplexity_256": 256,
    "stdlib_perplexity_512": 512,
    "stdlib_perplexity": 1024,
    "stdlib_perplexity_2048": 2048,
}
# Arguments of a model reach a task's dataset function through lm-eval's metadata.
MODEL_ARGUMENTS = {"pretrained": "x", "seed": 7, "window": 3, "topk": 1, "layers": "0", "limit": 1}


def load(name: str, metadata: dict[str, Any] | None = None) -> Any:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def documents(name: str, metadata: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [dict(doc) for doc in load(name, metadata).test_docs()]


def words_and_stops(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


@pytest.mark.parametrize(("name", "length"), NEEDLES.items())
def test_a_needle_stands_once_at_its_depth(name: str, length: int) -> None:
    docs = documents(name)
    assert len(docs) == 100
    for doc in docs:
        answer = doc["choices"][doc["answer"]]
        assert len(set(doc["choices"])) == 8
        words = re.findall(r"\w+", doc["prompt"])
        assert [word for word in words if word in doc["choices"]] == [answer]
        sentences = doc["prompt"].split("\n")[0].rstrip(".").split(". ")
        place = sentences.index(f"The pass word is {answer}")
        assert place == len(sentences) - 1 - doc["sentences_after"]
        assert abs(place / (len(sentences) - 1) - doc["depth"]) <= 0.5 / (len(sentences) - 1) + 1e-9
        assert abs(words_and_stops(doc["prompt"]) + 1 - length) <= 7


@pytest.mark.parametrize("name", NEEDLES)
def test_each_ten_needles_have_ten_depths_and_answers_are_spread(name: str) -> None:
    docs = documents(name)
    depths = [round(0.05 + 0.1 * step, 2) for step in range(10)]
    for start in range(0, 100, 10):
        assert sorted(round(doc["depth"], 2) for doc in docs[start : start + 10]) == depths
    places = [doc["answer"] for doc in docs]
    assert all(4 <= places.count(place) <= 25 for place in range(8))
    assert len({doc["choices"][doc["answer"]] for doc in docs}) >= 15
    assert len({doc["prompt"] for doc in docs}) == 100


def test_needles_are_the_same_on_every_machine_and_python() -> None:
    content = {name: documents(name) for name in NEEDLES}
    text = json.dumps(content, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a0eaba0a915029c3"


@pytest.mark.parametrize("name", ["needle_128", "stdlib_perplexity_256"])
def test_a_models_arguments_do_not_change_the_documents(name: str) -> None:
    assert documents(name, MODEL_ARGUMENTS) == documents(name)


@pytest.mark.parametrize("name", PERPLEXITIES)
def test_perplexity_reads_the_beginnings_of_the_running_pythons_sources(name: str) -> None:
    docs = documents(name)
    assert len(docs) == len({doc["module"] for doc in docs}) >= 50
    for doc in docs:
        module = Path(json.__file__).parents[1] / f"{doc['module']}.py"
        source = module.read_text(encoding="utf-8")
        assert source.startswith(doc["text"])
        assert len(source) > len(doc["text"])
        # Characters for one token, with room on either side: 2.5 to 4.8 by SmolLM2's tokenizer.
        assert 2 * PERPLEXITIES[name] < len(doc["text"]) < 5.5 * PERPLEXITIES[name]


def test_the_python_version_is_part_of_the_perplexity_tasks_version() -> None:
    task = load("stdlib_perplexity_512")
    assert platform.python_version() == task.config.metadata["python"]
    assert f"1.0+python{platform.python_version()}" == task.VERSION


@pytest.mark.parametrize("name", [*NEEDLES, *PERPLEXITIES])
def test_each_task_names_its_main_metric_and_chance(name: str) -> None:
    metadata = load(name).config.metadata
    needle = name in NEEDLES
    assert metadata["primary_metric"] == ("acc" if needle else "byte_perplexity")
    assert metadata["chance"] == (1 / 8 if needle else None)


class Knows(LM):
    """Gives every byte the likelihood 1/4, and finds every needle or none."""

    def __init__(self, finds: bool = True) -> None:
        super().__init__()
        self.finds = finds

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        answers = []
        for request in requests:
            context, choice = request.args
            seen = f"The pass word is{choice}." in context
            answers.append((0.0 if seen == self.finds else -9.0, seen))
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        return [-math.log(4) * len(request.args[0].encode()) for request in requests]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        raise AssertionError


def evaluate(names: list[str], model: LM) -> dict[str, Any]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(
        model=model, tasks=names, task_manager=manager, limit=20, bootstrap_iters=0
    )
    return dict(results)


def test_lm_eval_scores_the_needle_group() -> None:
    found = evaluate(["needle"], Knows())["results"]
    assert {name: found[name]["acc,none"] for name in NEEDLES} == dict.fromkeys(NEEDLES, 1.0)
    assert found["needle"]["acc,none"] == 1.0
    assert evaluate(["needle_128"], Knows(finds=False))["results"]["needle_128"]["acc,none"] == 0.0


def test_lm_eval_scores_perplexity_per_byte() -> None:
    results = evaluate(["stdlib_perplexity_256"], Knows())
    scores = results["results"]["stdlib_perplexity_256"]
    assert scores["byte_perplexity,none"] == pytest.approx(4.0)
    assert scores["bits_per_byte,none"] == pytest.approx(2.0)
    assert platform.python_version() in results["versions"]["stdlib_perplexity_256"]


def test_no_sources_are_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"argparse\.py; use a Python that is installed"):
        load("stdlib_perplexity")
