"""A training that diverges ends as any other does, and its files and figures say so."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sa_patch.training.pretraining import loop
from sa_patch.training.pretraining.comparison import (
    load_results,
    markdown,
    summarize,
    write_comparison,
)
from sa_patch.training.pretraining.figures import draw_comparison
from sa_patch.training.pretraining.methods import Method
from sa_patch.training.pretraining.run_folder import RunFolder
from sa_patch.training.pretraining.settings import load_settings
from tests.pictures import DRAWN, coloured
from tests.training.tiny_run import write_config


def strictly(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def trained(folder: Path, method: str = "gated:4", **changes: Any) -> RunFolder:
    settings = load_settings(write_config(folder, steps=4, **changes))
    chosen = Method.read(method, settings.window)
    return loop.pretrain(settings, chosen, 0, folder / "run", folder / "corpus", ["test"])


def test_a_run_to_nan_is_complete_and_compared(tmp_path: Path) -> None:
    run = trained(tmp_path, learning_rate=1e30, clip=1e30)
    result = strictly(run.path / "result.json")
    assert result["validation_loss"] is None and result["validation_perplexity"] is None
    for line in (run.path / "log.jsonl").read_text().splitlines():
        assert "NaN" not in line
    assert any(entry.get("loss", 0) is None for entry in run.entries())
    assert "diverged" in run.headline() and coloured(run.path / "loss.png") > DRAWN
    write_comparison([run.path], tmp_path, {})
    assert strictly(tmp_path / "comparison.json")["methods"]["gated:window=4"]["diverged"]
    assert "gated:window=4 seed 0" in (tmp_path / "comparison.md").read_text()


def test_a_perplexity_beyond_numbers_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop._Trainer, "_validate", lambda _: 800.0)
    result = strictly(trained(tmp_path, "full").path / "result.json")
    assert (result["validation_loss"], result["validation_perplexity"]) == (800.0, None)


def test_means_leave_diverged_runs_out_and_say_which(tmp_path: Path) -> None:
    sound = trained(tmp_path)
    result = sound.result()
    other = tmp_path / "other"
    other.mkdir()
    # As earlier versions wrote them.
    lost = {"seed": 1, "validation_loss": math.nan, "validation_perplexity": math.inf}
    (other / "result.json").write_text(json.dumps(result | lost))
    summary = summarize(load_results([sound.path, other]))
    entry = summary["methods"]["gated:window=4"]
    assert (entry["seeds"], entry["diverged"]) == ([0, 1], [1])
    assert entry["validation_perplexity"]["values"] == [result["validation_perplexity"]]
    assert entry["recall"]["values"] == [result["recall"]["accuracy"]]
    assert len(entry["gates"][0]["sa"]["values"]) == 1
    words = " ".join(text.get_text() for text in draw_comparison(summary).texts)
    for text in (markdown(summary), words):
        assert "left out of all means: gated:window=4 seed 1." in " ".join(text.split())
