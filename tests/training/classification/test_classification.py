"""Text classifiers: what is read, batched, chosen and measured, and that runs go on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.errors import UserError
from sa_patch.training.classification.comparison import choose, entry, markdown
from sa_patch.training.classification.data import (
    LabelledTexts,
    Numbered,
    Texts,
    learn_words,
    load_texts,
)
from sa_patch.training.classification.model import TextClassifier
from sa_patch.training.classification.settings import Classifier, Plan, Trial, read_attention
from sa_patch.training.classification.training import (
    accuracy,
    ensure_trial,
    read_trial,
    run_trial,
)
from tests.pictures import DRAWN, coloured
from tests.run_script import refusal
from tests.training.tiny_run import run_here, write_labelled_texts

COLUMNS = ("text", "label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def data(folder: Path) -> LabelledTexts:
    return load_texts(str(folder))


def trial(folder: Path, data: LabelledTexts, **changes: Any) -> Trial:
    settings: dict[str, Any] = {"alpha": 1.2, "head_dim": 8, "max_length": 16, "batch": 8}
    settings |= changes.pop("classifier", {})
    values: dict[str, Any] = {"seed": 0, "learning_rate": 0.01, "epochs": 6} | changes
    values["classifier"] = Classifier(**settings)
    return Trial(source=str(folder), fingerprint=data.fingerprint, **values)


def test_a_folder_is_read_and_split_without_its_test_texts(data: LabelledTexts) -> None:
    assert (len(data.train), len(data.test), data.classes) == (160, 40, 2)
    assert data.train.labels[:4] == (0, 1, 0, 1)
    kept, held_out = data.split(0.25, 1)
    assert (len(kept), len(held_out)) == (120, 40)
    assert sorted(kept.texts + held_out.texts) == sorted(data.train.texts)
    assert data.split(0.25, 2)[1] != held_out


@pytest.mark.parametrize(("texts", "share"), [(1, 0.2), (2, 0.99)])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(
    data: LabelledTexts, texts: int, share: float
) -> None:
    few = dataclasses.replace(data, train=data.train.take(range(texts)))
    with pytest.raises(UserError, match=f"of {texts} training texts out leaves none"):
        few.split(share, 0)
    assert [len(part) for part in data.split(0.99, 0)] == [2, 158]


def test_words_are_those_of_the_training_texts() -> None:
    tokenizer = learn_words(["The cat. The CAT sat", "a dog sat"], 5)
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["[PAD]"] == 0 and vocabulary["[UNK]"] == 1 and len(vocabulary) == 5
    assert {"the", "cat", "sat"} == set(vocabulary) - {"[PAD]", "[UNK]"}
    assert tokenizer.encode("the dog sat").tokens == ["the", "[UNK]", "sat"]


def test_batches_hold_every_text_once_beside_texts_of_its_length() -> None:
    texts = Texts(tuple("w " * (1 + i % 17) for i in range(100)), tuple(i % 2 for i in range(100)))
    numbered = Numbered(texts, learn_words(texts.texts, 10), 12)
    order = numbered.epoch(8, seed=0, epoch=0)
    assert sorted(order) == list(range(100))
    assert order != numbered.epoch(8, seed=0, epoch=1) and order == numbered.epoch(8, 0, 0)
    waste = 0
    for words, real, labels in numbered.batches(8, order):
        assert words.shape == real.shape and words.shape[1] <= 12
        assert bool(((words > 0) == real).all()) and len(labels) == len(words)
        waste += int((~real).sum())
    assert waste < 60  # of about 900 words; in random batches it is more than 400


@pytest.mark.parametrize("alpha", [None, 1.2, 2.0])
def test_a_classifier_does_not_see_padding(alpha: float | None) -> None:
    torch.manual_seed(0)
    model = TextClassifier(Classifier(alpha=alpha, head_dim=8, layers=2, heads=2), 20, 3).eval()
    words = torch.randint(1, 20, (2, 9))
    real = torch.arange(9) < torch.tensor([[9], [4]])
    found = model(words * real, real)
    assert torch.allclose(found[1:], model(words[1:, :4], real[1:, :4]), atol=1e-5)
    assert not torch.allclose(found[:1], model(words[:1, :4], real[1:, :4]), atol=1e-3)


def test_attentions_start_from_the_same_weights() -> None:
    models = []
    for alpha in (None, 1.2):
        torch.manual_seed(3)
        models.append(TextClassifier(Classifier(alpha=alpha, head_dim=8), 20, 2).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("alpha", ["dot", "1.2", "2"])
def test_a_trial_learns_what_there_is_to_learn(
    folder: Path, data: LabelledTexts, alpha: str
) -> None:
    one = trial(folder, data, classifier={"alpha": read_attention(alpha)})
    result = run_trial(one, data)
    assert result["accuracy"] == 1.0 and result["training_loss"][-1] < 0.2
    again = run_trial(one, data)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_a_held_out_trial_reads_no_test_text(folder: Path, data: LabelledTexts) -> None:
    poisoned = LabelledTexts(data.train, Texts((), ()), data.classes, data.fingerprint)
    result = run_trial(trial(folder, data, held_out=0.25, epochs=2), poisoned)
    assert len(result["held_out_accuracy"]) == 2 and "accuracy" not in result
    assert (result["train_texts"], result["measured_texts"]) == (120, 40)


def test_accuracy_is_the_share_of_right_labels(data: LabelledTexts) -> None:
    class Always(torch.nn.Module):
        def forward(self, words: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0]]).expand(len(words), 2)

    numbered = Numbered(data.test.take(range(5)), learn_words(data.train.texts, 10), 9)
    assert accuracy(Always(), numbered, torch.device("cpu")) == 2 / 5  # type: ignore[arg-type]


def test_the_best_mean_is_chosen_and_of_equals_the_shortest(
    folder: Path, data: LabelledTexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = {
        (0.01, 1000): [0.5, 0.9, 0.7], (0.01, 1001): [0.5, 0.5, 0.7],
        (0.1, 1000): [0.6, 0.8, 0.8], (0.1, 1001): [0.6, 0.8, 0.8],
    }  # fmt: skip
    monkeypatch.setattr(
        "sa_patch.training.classification.training.run_trial",
        lambda one, *_: {"held_out_accuracy": curves[one.learning_rate, one.seed]},
    )
    classifier = Classifier(alpha=1.2, head_dim=8)
    plan = Plan(
        classifiers=(classifier,),
        trials=1,
        learning_rates=(0.01, 0.1),
        epochs=3,
        choosing=2,
        held_out=0.2,
    )
    trials = plan.trials_of(str(folder), data.fingerprint, classifier)
    for one in trials:
        ensure_trial(one, tmp_path, COLUMNS)
    found = choose(trials, tmp_path)
    assert (found["learning_rate"], found["epochs"]) == (0.1, 2)
    assert found["held_out_accuracy"] == pytest.approx(0.8)


def test_a_trial_is_done_once_and_a_torn_file_again(
    folder: Path, data: LabelledTexts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trial(folder, data, epochs=1)
    path = ensure_trial(one, tmp_path, COLUMNS)
    before = path.stat().st_mtime_ns
    assert ensure_trial(one, tmp_path, COLUMNS).stat().st_mtime_ns == before
    path.write_text(path.read_text()[:40])
    assert read_trial(one, tmp_path) is None
    assert "damaged" in capsys.readouterr().err
    ensure_trial(one, tmp_path, COLUMNS)
    assert read_trial(one, tmp_path) is not None
    names = {trial(folder, data, seed=s, epochs=e).file_name for s in (0, 1) for e in (1, 2)}
    assert len(names) == 4
    assert trial(folder, data, classifier={"dropout": 0.2}).file_name not in names


def test_near_alphas_have_names_of_their_own() -> None:
    alphas = (1, 1.2, 1.2000001, 2.0)
    names = [Classifier(alpha=alpha, head_dim=4).attention for alpha in alphas]
    assert names == ["fna 1", "fna 1.2", "fna 1.2000001", "fna 2"]


def test_a_trial_that_diverges_has_a_file_and_no_graph(
    folder: Path, data: LabelledTexts, tmp_path: Path
) -> None:
    def measure(*_: Any) -> dict[str, Any]:
        raise AssertionError("there is nothing to measure")

    one = trial(folder, data, learning_rate=1e30, epochs=2)
    path = ensure_trial(one, tmp_path, COLUMNS, measure)
    assert "NaN" not in path.read_text()
    found = read_trial(one, tmp_path)
    assert found is not None and found["diverged"] and found["training_loss"][-1] is None
    chosen = {"learning_rate": 1e30, "epochs": 2, "held_out_accuracy": 0.5}
    row = entry("some/texts", one.classifier, chosen, [found, found])
    assert row["graph"] is None and "(2 diverged)" in markdown({"notes": [], "entries": [row]})
    # As earlier versions wrote it.
    path.write_text(path.read_text().replace("null", "NaN"))
    assert read_trial(one, tmp_path) == found


OPTIONS = ("--attention", "dot,1.2", "--head-dim", "4", "--trials", "2", "--epochs", "2",
           "--choosing", "1", "--batch", "8", "--max-length", "16")  # fmt: skip


def test_the_script_goes_on_where_it_was_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("classify", str(folder), *OPTIONS, "--out", "out")
    trials = tmp_path / "out" / "trials"

    def interrupted(*given: Any) -> dict[str, Any]:
        if len(list(trials.iterdir())) == 3:
            raise KeyboardInterrupt
        return run_trial(*given)

    with monkeypatch.context() as patch:
        patch.setattr("sa_patch.training.classification.training.run_trial", interrupted)
        run_here(*arguments, cwd=tmp_path, status=130)
    kept = {path: path.stat().st_mtime_ns for path in trials.iterdir()}
    assert len(kept) == 3
    out = run_here(*arguments, cwd=tmp_path)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
    # For each attention two rates to choose from and two trials.
    assert len(list(trials.glob("*.json"))) == 8
    found = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert [row["attention"] for row in found["entries"]] == ["dot", "fna 1.2"]
    assert all(len(row["accuracy"]["values"]) == 2 for row in found["entries"])
    assert found["provenance"]["versions"]["torch"] and "test texts are read once" in out
    assert coloured(tmp_path / "out" / "classification.png") > DRAWN
    for kind in ("svg", "md"):
        assert (tmp_path / "out" / f"classification.{kind}").stat().st_size > 300


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attention", "3"], "alpha must be"),
        (["--attention", "soft"], "an attention is dot"),
        (["--attention", "1.2,1.20"], "different values"),
        (["--head-dim", "0"], "head_dim must be at least 1"),
        (["--cores", "999"], "usable are"),
        (["--label-column", "kind"], "no column 'kind'"),
        (["--held-out", "1"], "held_out must be below 1"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(folder), *options, "--out", str(tmp_path / "out")]
    assert words in refusal("classify", arguments, monkeypatch, capfd)
    assert not list(tmp_path.glob("out/trials/*"))


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the data set"):
        load_texts(str(tmp_path / "none"))
