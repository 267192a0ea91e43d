"""Comparing runs: one command trains what is missing, and the table says what the runs say."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from sa_patch.errors import UserError
from sa_patch.training.pretraining.comparison import load_results, markdown, summarize
from sa_patch.training.pretraining.loop import pretrain
from sa_patch.training.pretraining.methods import Method
from sa_patch.training.pretraining.run_folder import run_name
from sa_patch.training.pretraining.settings import load_settings
from tests.pictures import DRAWN, coloured
from tests.run_script import refusal
from tests.training.tiny_run import run_here, write_config


def train(folder: Path, *chosen: tuple[str, int]) -> list[Path]:
    """Runs of methods and seeds in ``folder/runs``, where `compare_pretraining` looks for them."""
    settings, runs = load_settings(write_config(folder, steps=4)), folder / "runs"
    done = []
    for name, seed in chosen:
        method = Method.read(name, settings.window)
        out = runs / run_name(str(method), seed)
        done.append(pretrain(settings, method, seed, out, runs / "corpus", ["test"]).path)
    return done


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_missing_runs_are_trained_and_the_summary_is_that_of_all(tmp_path: Path) -> None:
    train(tmp_path, ("swa", 0), ("gated:4", 0), ("swa", 1))
    options = ("--methods", "swa,gated:4", "--seeds", "0,1", "--runs", "runs", "--out", "out")
    text = run_here("compare_pretraining", str(tmp_path / "mini.yaml"), *options, cwd=tmp_path)
    trained = [line for line in text.splitlines() if "perplexity" in line]
    assert len(trained) == 1 and "gated-window=4-seed1" in trained[0]
    summary = read(tmp_path / "out" / "comparison.json")
    assert list(summary["methods"]) == ["swa:window=8", "gated:window=4"]
    for method, entry in summary["methods"].items():
        folders = [tmp_path / "runs" / run_name(method, seed) for seed in (0, 1)]
        runs = [read(folder / "result.json") for folder in folders]
        values = [each["validation_perplexity"] for each in runs]
        assert entry["validation_perplexity"] == {
            "mean": pytest.approx(statistics.fmean(values)),
            "deviation": pytest.approx(statistics.stdev(values)),
            "values": values,
        }
        questions = sum(bucket["questions"] for bucket in entry["recall_by_distance"])
        assert questions == runs[0]["recall"]["questions"] > 0
    assert len(summary["methods"]["gated:window=4"]["gates"]) == 2
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table == markdown(summary)
    assert table.count("| `") == 2 and table.count("±") >= 6
    assert coloured(tmp_path / "out" / "comparison.png") > DRAWN
    assert (tmp_path / "out" / "comparison.svg").stat().st_size > 10_000


def test_runs_that_were_not_trained_alike_are_not_compared(tmp_path: Path) -> None:
    swa, gated = train(tmp_path, ("swa", 0), ("gated:4", 0))
    with pytest.raises(UserError, match="same method and seed"):
        load_results([swa, gated, swa])
    other = read(gated / "result.json")
    other["settings"]["steps"] = 5
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "result.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="another settings"):
        load_results([swa, changed])
    assert summarize(load_results([swa]))["methods"]["swa:window=8"]["seeds"] == [0]


@pytest.mark.parametrize(
    "options, says",
    [
        (["--seeds", "0,0"], "--seeds must be different"),
        (["--cores", "0,00"], "--cores must be different"),
        (["--seeds", "²"], "--seeds must be different"),
        (["--out", "mini.yaml/out"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence_before_training(
    options: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert says in refusal("compare_pretraining", [config.name, *options], monkeypatch, capfd)
    assert not (tmp_path / "runs").exists()
