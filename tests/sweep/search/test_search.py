"""``sa-patch search``: within the budget, resumable, and what it writes goes where patterns go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from sa_patch.cli.command import main
from sa_patch.evaluation.calibration import measurement
from sa_patch.evaluation.calibration.measurement import predicted
from sa_patch.evaluation.calibration.schedule_file import read_layers
from sa_patch.patterns import flops_share, parse_pattern
from sa_patch.sweep.config import parse_config
from sa_patch.sweep.search import quality, run, space
from sa_patch.sweep.search.options import Options
from sa_patch.sweep.search.study import open_study

SMALL = ["--n", "384", "--share", "1/4", "--trials", "3", "--documents", "1", "--held-out", "1"]
FEW = ("sinks and sliding window", "block_topk", "flashprefill, small blocks")


@pytest.fixture(autouse=True)
def few_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fits easily, one that chooses, and one whose blocks are too large here."""
    monkeypatch.setattr(run, "NAMED", {name: space.NAMED[name] for name in FEW})


def prefills(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[Any]:
    """The documents that are read from here on; before one more than `stop_at`, Ctrl-C."""
    read: list[Any] = []

    def counted(model: Any, document: Any, places: Any) -> Any:
        if len(read) == stop_at:
            raise KeyboardInterrupt
        read.append(document)
        return predicted(model, document, places)

    for module in (measurement, quality):
        monkeypatch.setattr(module, "predicted", counted)
    return read


def found_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return content


def without_failed(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trials but for their numbers, of which a trial that was interrupted takes one."""
    return [{k: v for k, v in trial.items() if k not in ("number", "repeats")} for trial in trials]


def test_a_search_keeps_to_its_budget_and_goes_on(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ["search", str(checkpoint), *SMALL, "--out"]
    with monkeypatch.context() as patch:
        read = prefills(patch)
        assert main([*command, str(whole)]) == 0
        in_one_go = len(read)
        # As prompts do, a text asks one question, at its end.
        assert {len(one.asked) for one in read if one.kind == "recall"} == {1}
    shown = capfd.readouterr()
    assert "best named:" in shown.out and str(whole / "found.yaml") in shown.out
    assert "flashprefill:{},32,local=2,last=1 does not fit" in shown.err
    content = found_in(whole)
    trials = content["trials"]["compositions"]
    measured = [trial for trial in trials if trial["rungs"]]
    assert [trial.get("named") for trial in trials][:3] == list(FEW)
    assert trials[2]["state"] == "pruned" and "refused" in trials[2]
    assert len([one for one in measured if "named" not in one and "repeats" not in one]) == 3
    for trial in measured:
        ((text, layers),) = trial["patterns"].items()
        assert layers == [0, 1, 2]
        # The checkpoint's two query heads share a KV head.
        if "shared=" not in text:  # what shared choices show is counted
            assert trial["flops"] == pytest.approx(flops_share(parse_pattern(text), 384, 2))
        assert trial["flops"] <= 1 / 4
    best = max(one["rungs"][-1] for one in measured if one["state"] == "complete")
    assert content["finalists"][0]["recovery"] == best
    assert content["provenance"]["command"][:2] == ["sa-patch", "search"]
    # A stop in the middle of a trial costs no other one, and changes nothing.
    with monkeypatch.context() as patch:
        # The comparison at the end reads at most six documents.
        before = prefills(patch, stop_at=in_one_go - 7)
        assert main([*command, str(stopped)]) == 130
        assert len(before) == in_one_go - 7
    with (stopped / "study.journal").open("a") as journal:
        journal.write('{"op_code": 4, "wor')  # as a kill in the middle of a write leaves it
    with monkeypatch.context() as patch:
        after = prefills(patch)
        assert main([*command, str(stopped)]) == 0
    assert "trials are known from" in capfd.readouterr().err
    assert len(after) < in_one_go
    again = found_in(stopped)
    assert without_failed(again["trials"]["compositions"]) == without_failed(trials)
    assert again["finalists"] == content["finalists"]
    # What was found goes wherever a pattern goes.
    file = str(whole / "found.yaml")
    pattern = parse_pattern(file)
    assert {str(pattern)} == set(content["finalists"][0]["patterns"])
    config = parse_config({"methods": [file, {"pattern": file}], "tasks": ["needle_128"]})
    assert [method.pattern for method in config.methods] == [pattern]
    generate = ["generate", str(checkpoint), "The old man", "--max-new-tokens", "2"]
    assert main([*generate, "--pattern", file]) == 0


@pytest.mark.parametrize("name", space.NAMED)
def test_named_methods_are_points_of_the_space(name: str) -> None:
    family = space.propose(optuna.trial.FixedTrial(dict(space.NAMED[name])), keys=256)
    number = "0.5" if "flashprefill" in family or "threshold=" in family else "2"
    assert str(parse_pattern(family.replace("{}", number)))


def test_visited_keys_and_layers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of those that choose by content, counted where they are run, one that is quick to count.
    cores = ("swa", "block_topk")
    monkeypatch.setattr(space, "CORES", {name: space.CORES[name] for name in cores})
    monkeypatch.setattr(run, "NAMED", {name: space.NAMED[name] for name in FEW[:2]})
    out = tmp_path / "search"
    command = ["search", str(checkpoint), *SMALL, "--trials", "1", "--out", str(out)]
    more = ["--n", "640", "--share", "1/2", "--cost", "visited", "--layer-trials", "2"]
    assert main([*command, *more]) == 0
    content = found_in(out)
    both = content["trials"]["compositions"] + content["trials"]["layers"]
    assert all(trial["visited"] <= 1 / 2 + 1e-9 for trial in both if trial["rungs"])
    assert [t["named"] for t in content["trials"]["layers"] if "named" in t] == ["even"]
    by_layer = content["finalists"][0]["patterns"]
    written = yaml.safe_load((out / "found.yaml").read_text())
    if len(by_layer) == 1:
        assert {written["pattern"]} == set(by_layer)
        return
    schedule = read_layers(str(out / "found.yaml"))
    named = {index: str(pattern) for index, pattern in schedule.own or ()}
    assert named == {index: text for text, own in by_layer.items() for index in own}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--share", "2"], "--share is a part of full attention's cost"),
        (["--share", "1/8 of it"], "--share is a part of full attention's cost"),
        (["--n", "512", "--share", "0.001"], "more than 0.001; take a larger share"),
        (["--cost", "time"], "cost"),
        (["--trials", "0"], "--trials must be a whole number of at least 1"),
        (
            ["--documents", "4", "--held-out", "2"],
            "--held-out must be a whole number of at least 4",
        ),
        (["--n", "100000"], "more than the model's context"),
        (["--text", "missing.txt"], "no text file missing.txt"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(
    options: list[str],
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "load_causal_lm", pytest.fail)
    assert main(["search", str(checkpoint), "--out", str(tmp_path / "out"), *options]) == 2
    error = capfd.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_search_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "load_tokenizer", pytest.fail)
    settings = Options(str(checkpoint), n=512, out=tmp_path)
    open_study(tmp_path, "compositions", settings.settings(settings.check()))
    assert main(["search", str(checkpoint), "--n", "384", "--out", str(tmp_path)]) == 2
    assert "was begun with another n (512, not 384)" in capfd.readouterr().err
    before = tmp_path / "before"
    former = {k: v for k, v in settings.settings(settings.check()).items() if k != "edition"}
    before.mkdir()
    open_study(before, "compositions", former)
    assert main(["search", str(checkpoint), "--n", "512", "--out", str(before)]) == 2
    assert "was begun with another edition (None, not 4)" in capfd.readouterr().err
    (tmp_path / "study.journal").write_text("{}\n" * 2)
    assert main(["search", str(checkpoint), "--n", "512", "--out", str(tmp_path)]) == 2
    assert "is no journal of sa-patch search" in capfd.readouterr().err


def test_a_file_without_a_pattern_is_refused(tmp_path: Path) -> None:
    from sa_patch.errors import UserError

    file = tmp_path / "found.yaml"
    for content in ("layers: 0-3", "pattern: 5", "- a"):
        file.write_text(content)
        with pytest.raises(UserError, match="has no text form under 'pattern'"):
            parse_pattern(str(file))
    with pytest.raises(UserError, match="no pattern file"):
        parse_pattern(str(tmp_path / "other.yaml"))
