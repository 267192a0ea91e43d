"""RULER's documents: made offline, by the model's own tokenizer, the same ones every time."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from sa_patch.errors import UserError
from sa_patch.evaluation.tasks import catalogue as catalogues
from sa_patch.evaluation.tasks import ruler
from sa_patch.evaluation.tasks.catalogue import Catalogue
from sa_patch.evaluation.tasks.names import current_name, recorded_name
from tests.thorough import THOROUGH, unless_thorough

OFFLINE = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
)


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    """RULER's folder alone, and of its 6 million words few: they take lm-eval 20 seconds."""
    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    with pytest.MonkeyPatch.context() as patch:
        manager = TaskManager(include_path=folder, include_defaults=False)
        patch.setattr(catalogues, "_every_task", lambda _: manager)
        if not THOROUGH:
            patch.setattr("wonderwords.RandomWord", few_words)
            for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
                patch.delitem(sys.modules, name)
        yield Catalogue(["ruler"])
        for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
            del sys.modules[name]


def few_words() -> Any:
    kinds = {"noun": "nouns", "adjective": "adjectives", "verb": "verbs"}
    words = {one: [f"{one}{number}" for number in range(50)] for one in kinds}
    return SimpleNamespace(_categories={**words, **{kinds[one]: words[one] for one in kinds}})


def documents(catalogue: Catalogue, name: str, checkpoint: Path, length: int) -> list[Any]:
    info = catalogue.info(name, length)
    metadata = {"tokenizer": str(checkpoint), "max_seq_lengths": [length]}
    return list(catalogue.load(info, None, metadata)["tasks"][name].test_docs())


@pytest.mark.parametrize("name", unless_thorough(("ruler_cwe",), OFFLINE))
def test_documents_do_not_depend_on_what_was_made_before(
    catalogue: Catalogue, checkpoint: Path, name: str
) -> None:
    catalogue.check_inputs(catalogue.info(name, 1024), None)
    random.seed(5)
    state = random.getstate()
    first = documents(catalogue, name, checkpoint, 1024)
    assert random.getstate() == state
    random.seed(6)
    assert documents(catalogue, name, checkpoint, 1024) == first
    assert {doc["max_length"] for doc in first} == {1024}


def test_scores_have_plain_names_and_depths(catalogue: Catalogue, checkpoint: Path) -> None:
    info = catalogue.info("niah_single_1", 2048)
    assert (info.primary_metric, info.chance, info.length) == ("string_match", 0.0, 2048)
    metadata = {"tokenizer": str(checkpoint), "max_seq_lengths": [2048]}
    task = catalogue.load(info, None, metadata)["tasks"]["niah_single_1"]
    doc = list(task.test_docs())[0]
    depth = ruler.needle_depth(doc)
    place = doc["input"].index(doc["outputs"][0]) / len(doc["input"])
    assert depth is not None and abs(depth / 100 - place) <= 0.05
    found = task.process_results(doc, [f" {doc['outputs'][0]}."])
    assert found["string_match"] == found[f"acc_depth_{depth}"] == 1.0
    assert [key for key, value in found.items() if value is None] == [
        f"acc_depth_{other}" for other in ruler.DEPTHS if other != depth
    ]
    assert task.process_results(doc, ["none"])["string_match"] == 0.0


def test_what_is_missing_is_said_with_its_place(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr("requests.get", unreachable)
    for name, place in (
        ("niah_single_2", "DIR/baber/paul_graham_essays"),
        ("ruler_qa_squad", "DIR/ruler/squad"),
        ("ruler_qa_hotpot", "DIR/ruler/hotpotqa"),
    ):
        with pytest.raises(UserError, match=f"'{name}' reads .* put them at {place}, and give"):
            catalogue.check_inputs(catalogue.info(name, 4096), None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs wonderwords and nltk; install .*ruler"):
        catalogue.check_inputs(catalogue.info("niah_single_1", 4096), None)


def test_questions_are_read_from_a_local_copy(
    catalogue: Catalogue, checkpoint: Path, tmp_path: Path
) -> None:
    answers = [{"text": "seven"}]
    asked = [
        {"question": f"How many {i}?", "answers": answers, "is_impossible": False} for i in "ab"
    ]
    paragraphs = [{"context": f"Seven of them, {i}.", "qas": asked} for i in range(250)]
    place = tmp_path / "ruler" / "squad" / "dev-v2.0.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    info = catalogue.info("ruler_qa_squad", 1024)
    catalogue.check_inputs(info, tmp_path)
    metadata = {"tokenizer": str(checkpoint), "max_seq_lengths": [1024]}
    docs = list(catalogue.load(info, tmp_path, metadata)["tasks"]["ruler_qa_squad"].test_docs())
    assert len(docs) == 500 and {doc["outputs"][0] for doc in docs} == {"seven"}
    assert "Seven of them" in docs[0]["input"]


@pytest.mark.parametrize("length", [512, "4K", True])
def test_a_length_that_leaves_no_room_is_refused(length: Any) -> None:
    with pytest.raises(UserError, match="whole numbers of at least 1024"):
        ruler.check_length(length)


def test_earlier_names_of_our_tasks() -> None:
    assert current_name("passkey_512") == "recall_passkey_512"
    assert recorded_name("recall_passkey_512") == "passkey_512"
    for name in ("recall_passkey", "niah_multikey_2", "needle_128", "passkey"):
        assert current_name(name) == recorded_name(name) == name
