"""What a run trains on and ends with, and how mistakes are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from sa_patch import SA, SWA, Full
from sa_patch.errors import UserError
from sa_patch.patching import layer_patterns
from sa_patch.training.pretraining.batches import Batches
from sa_patch.training.pretraining.corpus import Corpus, prepare
from sa_patch.training.pretraining.evaluate import gate_statistics, recall_hits, recall_summary
from sa_patch.training.pretraining.loop import learning_rate, pretrain, weighted_loss
from sa_patch.training.pretraining.methods import Method, build_model, set_attention
from sa_patch.training.pretraining.recall import RecallTokens, recall_document
from sa_patch.training.pretraining.settings import (
    PretrainingSettings,
    RecallSettings,
    load_settings,
)
from tests.pictures import DRAWN, coloured
from tests.run_script import refusal
from tests.training.tiny_run import ROOT, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def corpus(config: Path) -> Corpus:
    return prepare(config.parent / "corpus", load_settings(config).text)


@pytest.fixture
def settings(config: Path) -> PretrainingSettings:
    return load_settings(config)


def test_text_in_the_corpus_reads_back_and_held_out_text_is_other_text(corpus: Corpus) -> None:
    train = corpus.tokenizer.decode(corpus.train.tolist()).split("<|endoftext|>")
    held_out = corpus.tokenizer.decode(corpus.validation.tolist()).split("<|endoftext|>")
    assert train[0] == "value 1 of 1 is not 1\n" * 8
    assert held_out[0] == "value 0 of 0 is not 0\n" * 8
    assert not set(held_out) & set(train[:-1]) - {""}


def test_an_epoch_shows_every_chunk_once(corpus: Corpus, settings: PretrainingSettings) -> None:
    settings = settings.model_copy(update={"recall": RecallSettings()})
    batches = Batches(corpus, settings, seed=0)
    chunks = len(corpus.train) // 64
    shown = torch.cat([batches.step(step)[0] for step in range(chunks // 4 + 1)])[:chunks]
    expected = torch.from_numpy(corpus.train[: chunks * 64].astype(np.int64)).view(chunks, 64)
    assert sorted(shown.tolist()) == sorted(expected.tolist())
    assert not torch.equal(shown, expected)
    other = Batches(corpus, settings, seed=1)
    assert not torch.equal(other.step(0)[0], batches.step(0)[0])


def test_processes_share_a_step_and_nothing_depends_on_earlier_steps(
    corpus: Corpus, settings: PretrainingSettings
) -> None:
    whole = Batches(corpus, settings, seed=0).step(5)
    parts = [Batches(corpus, settings, seed=0).step(5, process, 2) for process in (0, 1)]
    for index in (0, 1):
        joined = torch.stack([part[index] for part in parts], dim=1).flatten(0, 1)
        assert torch.equal(joined, whole[index])
    recalls = (whole[1] == 0).any(1)
    assert int(recalls.sum()) == 2  # half of the four sequences are recall documents
    assert whole[1][recalls].unique().tolist() == [0, 3] and (whole[1][~recalls] == 1).all()


def test_the_loss_weighs_tokens() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    weights = torch.randint(4, (2, 5)).float()
    nats = -logits.log_softmax(-1)
    expected = sum(
        weights[row, t] * nats[row, t - 1, tokens[row, t]] for row in (0, 1) for t in range(1, 5)
    )
    assert weighted_loss(logits, tokens, weights) == pytest.approx(float(expected), rel=1e-5)


RECALL_TOKENS = RecallTokens(0, tuple(range(100, 116)), tuple(range(200, 216)))


def made_document(index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    text = np.arange(1, 90, dtype=np.uint32)
    return recall_document(np.random.default_rng(index), 200, RECALL_TOKENS, text)


def test_a_recall_question_has_its_answer_at_the_distance_it_says() -> None:
    seen = set()
    for index in range(50):
        tokens, distance = made_document(index)
        assert tokens.shape == distance.shape == (200,)
        asked = np.flatnonzero(distance)
        assert len(asked) and set(tokens[asked - 1]) <= set(RECALL_TOKENS.keys)
        for place in asked:
            shown = place - 1 - distance[place]
            # The latest pair of that key, so that its value is the only right answer.
            earlier = np.flatnonzero(tokens[: place - 1] == tokens[place - 1])
            assert earlier[-1] == shown - 1
            assert tokens[shown] == tokens[place] and tokens[shown - 1] == tokens[place - 1]
        seen |= set(distance[asked].tolist())
    assert min(seen) < 8 and max(seen) > 150


class Oracle(torch.nn.Module):
    """Answers a question rightly if its distance is below `reach`."""

    def __init__(self, rows: torch.Tensor, distance: torch.Tensor, reach: int) -> None:
        super().__init__()
        self.told = torch.where(distance < reach, rows, rows * 0)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.nn.functional.one_hot(self.told, 300).float().roll(-1, dims=1)
        return type("Output", (), {"logits": logits})


def test_recall_counts_by_distance() -> None:
    made = zip(*map(made_document, range(30)), strict=True)
    rows, distance = (torch.from_numpy(np.stack(part)) for part in made)
    hits = recall_hits(Oracle(rows, distance, 32), rows, distance, 16, 30, torch.device("cpu"))
    found = recall_summary(hits, 16)
    accuracies = [row["accuracy"] for row in found["by_distance"]]
    assert accuracies == [1, 1, 0, 0]
    assert found["questions"] == int((distance > 0).sum())


def test_rivals_start_from_the_same_weights(settings: PretrainingSettings) -> None:
    models = [
        build_model(Method.read(name, 8), settings, 600, seed=4).state_dict()
        for name in ("full", "swa", "gated")
    ]
    for name, value in models[0].items():
        assert all(torch.equal(value, other[name]) for other in models[1:])


def test_patterns_are_redrawn_in_every_step_and_fixed_in_evaluation(
    settings: PretrainingSettings,
) -> None:
    method = Method.read("sa", 8)
    model = build_model(method, settings, 600, seed=4)
    drawn = []
    for step in (0, 1, 0, None):
        set_attention(model, method, settings, 4, step)
        drawn.append(layer_patterns(model)[0])
    assert drawn[0] == drawn[2] != drawn[1] and drawn[3] == SA(8, seed=4)


def test_learning_rate_rises_and_falls(settings: PretrainingSettings) -> None:
    rates = [learning_rate(settings, step) for step in range(12)]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert rates[-1] == pytest.approx(0.001)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_methods_read_their_text_forms() -> None:
    assert Method.read("gated", 8) == Method.read("gated:8", 32) == Method(Full(), 8)
    assert Method.read("swa", 8) == Method(SWA(8)) == Method.read("swa:8", 32)
    assert str(Method.read("gated:window=16", 8)) == "gated:window=16"
    assert str(Method.read("sa", 8)) == "sa:window=8" == str(Method.read("sa:8,seed=0", 32))
    for alpha, text in (("1.2", "1.2"), ("2.0", "2"), ("1", "1"), ("1.23456789", "1.23456789")):
        method = Method.read(f"fna:alpha={alpha},pattern=swa:8", 32)
        assert str(method) == f"fna:alpha={text},pattern=swa:window=8"
        assert Method.read(str(method), 32) == method
    for name in ("gated:", "gated:x", "gated:²", "gated:0", "saw", "swa:0", "sa:8,seed=3"):
        with pytest.raises(UserError):
            Method.read(name, 8)


def test_a_run_learns_and_its_model_loads(
    tmp_path: Path, corpus: Corpus, config: Path, settings: PretrainingSettings
) -> None:
    method = Method.read("gated", 8)
    folder = pretrain(settings, method, 0, tmp_path / "run", config.parent / "corpus", ["test"])
    result = folder.result()
    losses = [entry["validation_loss"] for entry in result["log"] if "validation_loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0] < np.log(len(corpus.tokenizer))
    assert result["validation_loss"] == pytest.approx(losses[1])
    model = AutoModelForCausalLM.from_pretrained(folder.model)
    assert int(model.training_passes) == 24  # two micro-batches a step
    rows = torch.from_numpy(corpus.validation[:256].astype(np.int64)).view(4, 64)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss
    assert float(loss) == pytest.approx(result["validation_loss"], rel=1e-5)
    gates = gate_statistics(model, rows, 2, torch.device("cpu"))
    assert [len(row["sa"]["heads"]) for row in gates] == [2, 2]
    assert gates[1]["swa"]["mean"] == pytest.approx(result["gates"][1]["swa"]["mean"])
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    assert tokenizer.decode(tokenizer("of 3 is")["input_ids"]) == "of 3 is"
    assert coloured(folder.path / "loss.png") > DRAWN
    assert (folder.path / "loss.svg").stat().st_size > 5_000
    # Complete: nothing is trained again, and nothing is written.
    before = (folder.path / "result.json").stat().st_mtime_ns
    pretrain(settings, method, 0, folder.path, config.parent / "corpus", ["test"])
    assert (folder.path / "result.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="differs in seed"):
        pretrain(settings, method, 1, folder.path, config.parent / "corpus", ["test"])


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "source": (
        {"text": {"source": "json", "data_files": "nowhere.jsonl", "vocabulary": 512,
                  "validation_tokens": 64}}, [], "cannot be loaded",
    ),
    "folder": ({}, ["--out", "."], "is not empty and holds no run"),
    "corpus": ({}, ["--corpus", "text.jsonl"], "text.jsonl exists and is no corpus"),
    "corpus in a file": ({}, ["--corpus", "text.jsonl/corpus"], "corpus cannot be written"),
    "tasks": ({}, ["--tasks", "needle_128,needl_128"], "unknown task 'needl_128'; did you mean"),
    "seed": ({}, ["--seed", str(1 << 70)], "a seed must be a whole number from 0 to 4294967295"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes, options, says = MISTAKES[case]
    path = write_config(tmp_path, **changes)
    monkeypatch.chdir(tmp_path)
    assert says in refusal("pretrain", [str(path), *options], monkeypatch, capfd)
    assert not (tmp_path / "runs" / "pretrain-mini" / "gated-window=8-seed0").exists()


HEADS = {"layers": 1, "hidden": 10, "heads": 4, "kv_heads": 4, "intermediate": 8}
# What the message names: the key, the value that was given, and what is allowed.
BAD_SETTINGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"widnow": 8}, ["'widnow'", "did you mean 'window'"]),
    "share": ({"recall": {"share": 1.5}}, ["recall.share must be", "1", "got 1.5"]),
    "betas": ({"betas": [0.9, 1.0]}, ["betas", "must be", "1", "got 1.0"]),
    "backend": ({"backend": "bandd"}, ["'bandd'", "banded"]),
    "heads": ({"model": HEADS}, ["hidden must be an even multiple of heads", "10, 4 and 4"]),
    "nested": (
        {"text": {"vocab": 512, "vocabulary": 512, "validation_tokens": 9}},
        ["unknown key 'vocab'", "'text'", "vocabulary"],
    ),
    "recall": ({"sequence": 32}, ["at least 64 tokens"]),
    "held-out recall": ({"sequence": 32, "recall": {"documents": 1}}, ["at least 64 tokens"]),
    "sequence": ({"sequence": 1, "recall": {}}, ["sequence must be at least 2, got 1"]),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused_with_the_file_name(case: str, tmp_path: Path) -> None:
    changes, words = BAD_SETTINGS[case]
    with pytest.raises(UserError, match=r"mini\.yaml: ") as refused:
        load_settings(write_config(tmp_path, **changes))
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize("name", ["tiny", "360m"])
def test_packaged_configurations_are_valid(name: str) -> None:
    path = ROOT / "configs" / "pretrain" / f"{name}.yaml"
    settings = load_settings(path)
    assert settings.name == name
    plain = settings.to_dict()
    assert PretrainingSettings.read(yaml.safe_load(json.dumps(plain)), name) == settings
