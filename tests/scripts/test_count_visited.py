"""scripts/count_visited on a tiny model: patterns of a run, layer by layer, and any others."""

import json
from pathlib import Path

import pytest

from tests.run_script import refusal, run_script
from tests.sweep import run_builder
from tests.sweep.run_builder import RunBuilder
from tests.tiny_checkpoint import save_tiny_checkpoint

TASK, N = "stdlib_position_128", 128
WINDOW, CHOSEN = "swa:window=16", "moba:block_size=16,topk=2"


def share(count: dict) -> float:
    return float(count["visited_keys"]["16"] / count["full_visited_keys"]["16"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("model")))


def test_a_layer_with_a_pattern_of_its_own_counts_as_that(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run_builder.TASKS, TASK, ("perplexity,none", None, 7.0, N))
    builder = RunBuilder(tmp_path / "run", model_name=model)
    for pattern, layers in ((WINDOW, None), (CHOSEN, None), (WINDOW, {"1": CHOSEN})):
        builder.add(pattern, TASK, 8.0, share=0.25, layers=layers)
    folder = builder.write()
    assert run_script("count_visited", [str(folder)], monkeypatch) == 0
    counts = json.loads((folder / "visited.json").read_text())["counts"]
    window, chosen, mixed = counts
    assert window["choosing_keys"] == 0 < chosen["choosing_keys"]
    # One of three layers.
    assert mixed["choosing_keys"] == pytest.approx(chosen["choosing_keys"] / 3)
    assert share(window) < share(mixed) < share(chosen)


def test_patterns_of_no_run(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "counts.json"
    given = ["--patterns", "swa:16", "full", "--n", str(N), "--model", model, "--out", str(out)]
    assert run_script("count_visited", given, monkeypatch) == 0
    content = json.loads(out.read_text())
    assert content["session"]["model"] == model
    window, full = content["counts"]
    assert window["pattern"] == WINDOW and share(full) == 1
    assert f"{share(window):.1%}  {WINDOW}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "give folders of runs, or --patterns"),
        (["--patterns", "swa:16"], "--patterns needs a length"),
        (["--patterns", "swx:16", "--n", "64", "--out", "x"], "swx"),
        (["--patterns", "swa:16", "--n", "1", "--out", "x"], "--n must be"),
        (["no-run"], "no run folder at no-run"),
    ],
)
def test_what_cannot_be_counted_is_told(
    given: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert sentence in refusal("count_visited", given, monkeypatch, capfd)
