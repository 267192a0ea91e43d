"""``sa-patch analyze``: files and a table of each analysis, one sentence for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sa_patch.cli.command import main
from tests.tiny_checkpoint import save_tiny_checkpoint

TEXT = "The old man said that the pass word is river"
SMALL: dict[str, list[str]] = {
    "receptive": ["--n", "64", "--methods", "sa:8,swa:8,moba:8;2", "--depth", "9", "--draws", "0"],
    "graph": ["--n", "64", "--methods", "sa:8,sinks:2+swa:6", "--layers", "2", "--sample", "9"],
    "propositions": ["--n", "64", "--windows", "8,8", "--draws", "20", "--coverage-draws", "10"],
    "cost": ["--n", "1K,64", "--methods", "swa:8,full"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def analyze(
    capfd: pytest.CaptureFixture[str], out: Path, name: str, *arguments: str
) -> tuple[dict[str, Any], str]:
    """What the command wrote, and printed."""
    assert main(["analyze", name, *arguments, "--out", str(out)]) == 0
    shown = capfd.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}.{kind}" for kind in ("json", "png", "svg")
    ]
    for path in out.iterdir():
        assert str(path) in shown.replace("\n", "") and path.stat().st_size > 500
    written: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return written, shown


@pytest.mark.parametrize("name", SMALL)
def test_each_analysis_writes_and_prints(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    written, shown = analyze(capfd, tmp_path / "deep" / "er", name, *SMALL[name])
    assert written["analysis"] == name and name in shown
    provenance = written["provenance"]
    assert provenance["command"][:3] == ["sa-patch", "analyze", name]
    assert provenance["ended"] >= provenance["started"] and provenance["versions"]["scipy"]
    if name == "receptive":
        assert [one["pattern"] for one in written["patterns"][:3]] == [
            *("sa:window=8,seed=0", "swa:window=8", "moba:block_size=8,topk=2")
        ]
        assert written["patterns"][1]["layers_to"]["1.0"] == 9
    if name == "propositions":
        assert written["windows"] == [8] and len(written["checks"]) == 7
        assert f"{written['agree']} of 7 predictions" in shown
    if name == "cost":
        assert written["lengths"] == [64, 1024]


def test_the_same_numbers_and_figure_each_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, _ = analyze(capfd, tmp_path / "a", "cost", *SMALL["cost"])
    two, _ = analyze(capfd, tmp_path / "b", "cost", *SMALL["cost"])
    assert one.pop("provenance") and two.pop("provenance") and one == two
    drawn = [(tmp_path / folder / "cost.svg").read_bytes() for folder in ("a", "b")]
    assert drawn[0] == drawn[1]


def test_attention_maps_of_a_model(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--layer", "1", "--head", "3", "--methods", "full,swa:4,sa:4,sinks:2+swa:3"]
    written, _ = analyze(capfd, tmp_path, "attention", str(checkpoint), TEXT, *options)
    assert (written["layer"], written["head"], written["prompt"]) == (1, 3, TEXT)
    assert written["model_identity"] and written["dtype"] == "float32" and written["n"] > 8
    kept = [one["weight_kept"] for one in written["patterns"]]
    assert kept[0] == 1 and all(0 < one < 1 for one in kept[1:])


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["analyze", *arguments]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("sa-patch: error: ")
    return line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["receptive", "--n", "0"], "n must be a whole number of at least 1"),
        (["receptive", "--n", "x"], "--n takes whole numbers such as 512 or 4K, got 'x'"),
        (["receptive", "--depth", "0"], "depth must be a whole number of at least 1"),
        (["receptive", "--draws", "1"], "draws must be 0, or at least 10 for an interval"),
        (["receptive", "--queries", "1"], "queries must be a whole number of at least 2"),
        (["receptive", "--methods", "saa:4"], "unknown method 'saa'; did you mean 'sa'?"),
        (["receptive", "--methods", "sa"], "method 'sa' needs 'window'"),
        (["receptive", "--methods", ","], "--methods names no pattern"),
        (["receptive", "--methods", "full", "--n", "128K"], "take a smaller n or window"),
        (["graph", "--layers", "0"], "layers must be a whole number of at least 1"),
        (["receptive", "--seed", "-1"], "a seed must be a whole number from 0 to 4294967295"),
        (["graph", "--seed", "4194304K"], "a seed must be a whole number from 0 to 4294967295"),
        (["graph", "--sample", "1"], "sample must be a whole number of at least 2"),
        (["propositions", "--windows", "2K"], "take windows of at most 1024"),
        (["propositions", "--windows", ""], "give at least one window"),
        (["propositions", "--draws", "5"], "draws must be a whole number of at least 10"),
        (["cost", "--n", ""], "lengths must rise"),
        (["cost", "--head-dim", "0"], "head_dim must be a whole number of at least 1"),
    ],
)
def test_bad_input(
    arguments: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sentence in refused(capfd, *arguments, "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a"}, "at least 2 tokens, and the prompt has 1"),
        ({"prompt": "river " * 2100}, "more than the 2,048 of a map; shorten it"),
        ({"layer": "3"}, "--layer must be from 0 to 2 for this model, got 3"),
        ({"layer": "-1"}, "--layer must be from 0 to 2 for this model, got -1"),
        ({"head": "4"}, "--head must be from 0 to 3 for this model, got 4"),
        ({"dtype": "float7"}, "unknown dtype 'float7'"),
        ({"model": "./nowhere"}, "no model at nowhere"),
    ],
)
def test_bad_attention_is_refused_before_the_weights_are_loaded(
    changes: dict[str, str],
    sentence: str,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("sa_patch.analysis.prompt.load_causal_lm", unwanted)
    asked = {"model": str(checkpoint), "prompt": TEXT, "layer": "0", "head": "0", **changes}
    options = [f"--{name}={asked[name]}" for name in ("layer", "head", "dtype") if name in asked]
    options += ["--out", str(tmp_path / "out")]
    said = refused(capfd, "attention", asked["model"], asked["prompt"], *options)
    assert sentence in said and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    said = refused(capfd, "cost", "--n", "64", "--out", str(tmp_path / "file" / "below"))
    assert "cannot be written" in said and "--out" in said
