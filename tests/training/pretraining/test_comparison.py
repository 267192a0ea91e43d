"""Comparing runs: one command trains what is missing, and the table says what the runs say."""

import json
import statistics
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.training.pretraining.comparison import load_results, markdown, summarize
from sa_patch.training.pretraining.loop import pretrain
from sa_patch.training.pretraining.run_folder import run_name
from sa_patch.training.pretraining.settings import Method, load_settings
from tests.mistakes import refusal
from tests.training.pretraining.tiny_run import run, write_config


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    config = write_config(folder, steps=4)
    settings, runs = load_settings(config), folder / "runs"
    # All but one are there already, and are not trained again.
    for name, seed in (("swa", 0), ("gated:4", 0), ("swa", 1)):
        method = Method.read(name, settings.window)
        out = runs / run_name(str(method), seed)
        pretrain(settings, method, seed, out, runs / "corpus", ["test"])
    options = ("--methods", "swa,gated:4", "--seeds", "0,1", "--runs", "runs", "--out", "out")
    status, text, errors = run("compare_pretraining", str(config), *options, cwd=folder)
    assert status == 0, errors
    trained = [line for line in text.splitlines() if "perplexity" in line]
    assert len(trained) == 1 and "gated-window=4-seed1" in trained[0]
    return folder


def result_of(compared: Path, name: str) -> Path:
    return compared / "runs" / name / "result.json"


def test_the_summary_is_that_of_the_runs(compared: Path) -> None:
    summary = json.loads((compared / "out" / "comparison.json").read_text())
    assert list(summary["methods"]) == ["swa:window=8", "gated:window=4"]
    for method, entry in summary["methods"].items():
        runs = [
            json.loads(result_of(compared, run_name(method, seed)).read_text()) for seed in (0, 1)
        ]
        values = [each["validation_perplexity"] for each in runs]
        assert entry["validation_perplexity"] == {
            "mean": pytest.approx(statistics.fmean(values)),
            "deviation": pytest.approx(statistics.stdev(values)),
            "values": values,
        }
        questions = sum(bucket["questions"] for bucket in entry["recall_by_distance"])
        assert questions == runs[0]["recall"]["questions"] > 0
    assert len(summary["methods"]["gated:window=4"]["gates"]) == 2
    table = (compared / "out" / "comparison.md").read_text()
    assert table == markdown(summary)
    assert table.count("| `") == 2 and table.count("±") >= 6
    for kind in ("png", "svg"):
        assert (compared / "out" / f"comparison.{kind}").stat().st_size > 10_000


def test_runs_that_were_not_trained_alike_are_not_compared(compared: Path) -> None:
    swa, gated = (
        compared / "runs" / f"{name}-seed0" for name in ("swa-window=8", "gated-window=4")
    )
    with pytest.raises(UserError, match="same method and seed"):
        load_results([swa, gated, swa])
    other = json.loads((gated / "result.json").read_text())
    other["settings"]["steps"] = 5
    changed = compared / "changed"
    changed.mkdir()
    (changed / "result.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="another settings"):
        load_results([swa, changed])
    assert summarize(load_results([swa]))["methods"]["swa:window=8"]["seeds"] == [0]


@pytest.mark.parametrize(
    "options, says",
    [
        (["--seeds", "0,0"], "--seeds must be different"),
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
