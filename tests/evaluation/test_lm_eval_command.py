"""`sa-patch lm-eval`: whatever lm-eval raises is one sentence, and RULER gets its tokenizer."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval._cli import HarnessCLI
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from sa_patch.cli.command import main
from sa_patch.evaluation.tasks import catalogue

MODEL = ["--model", "sa-patch"]


@pytest.fixture(autouse=True)
def only_ruler(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    manager = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(catalogue, "_every_task", lambda _: manager)


def executing(monkeypatch: pytest.MonkeyPatch, act: Callable[[argparse.Namespace], Any]) -> None:
    """In place of lm-eval's evaluation."""
    monkeypatch.setattr(HarnessCLI, "execute", lambda _, options: act(options))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ValueError("Tasks not found: niah_singel_1"),
            "unknown task 'niah_singel_1'; did you mean",
        ),
        (ImportError("install jieba"), "a task needs a package that is not installed"),
        (ConnectionError("no hub"), "a data set or model cannot be fetched"),
        (KeyError("x"), "lm-eval stopped: KeyError: 'x'; --verbose shows where"),
    ],
)
def test_what_lm_eval_raises_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    sentence: str,
) -> None:
    def fail(_: argparse.Namespace) -> None:
        raise error

    executing(monkeypatch, fail)
    assert main(["lm-eval", *MODEL, "--tasks", "niah_singel_1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"sa-patch: error: {sentence}") and "Traceback" not in "".join(said)
    if isinstance(error, KeyError):
        main(["lm-eval", *MODEL, "--tasks", "niah_singel_1", "--verbose"])
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ("{bad", "lm-eval stopped: ValueError: Invalid JSON: {bad"),
        ("max_seq_lengths=[512]", "RULER's max_seq_lengths are whole numbers of at least 1024"),
    ],
)
def test_bad_metadata(capsys: pytest.CaptureFixture[str], metadata: str, sentence: str) -> None:
    arguments = ["lm-eval", *MODEL, "--tasks", "niah_single_1", "--metadata", metadata]
    assert main(arguments) == 2
    assert f"sa-patch: error: {sentence}" in capsys.readouterr().err


def test_ruler_gets_the_models_own_tokenizer(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    found = []

    def look(options: argparse.Namespace) -> None:
        found.append(options.metadata)
        tokenizer = AutoTokenizer.from_pretrained(options.metadata["tokenizer"])
        found.append(tokenizer("teacher").input_ids)

    executing(monkeypatch, look)
    arguments = [*MODEL, "--model_args", f"pretrained={checkpoint}", "--tasks", "niah_single_*"]
    monkeypatch.setattr("sa_patch.evaluation.tasks.ruler.check_inputs", lambda *_: None)
    assert main(["lm-eval", *arguments, "--metadata", "max_seq_lengths=[1024]"]) == 0
    assert found[0]["max_seq_lengths"] == [1024]
    assert found[1] == AutoTokenizer.from_pretrained(checkpoint)("teacher").input_ids
    executing(monkeypatch, lambda options: found.append(options.metadata))
    assert main(["lm-eval", *arguments, "--metadata", "tokenizer=mine"]) == 0
    assert found[-1] == {"tokenizer": "mine"}
