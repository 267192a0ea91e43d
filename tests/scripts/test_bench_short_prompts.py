"""scripts/bench_short_prompts: what is timed, what is written, one sentence for mistakes."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from sa_patch.benchmark.prefill import setups
from sa_patch.benchmark.prefill.setups import Setup
from tests.run_script import refusal, run_script
from tests.tiny_checkpoint import save_tiny_checkpoint

SCRIPT = "bench_short_prompts"
SMALL = ["--small", "--prompts", "2", "--budget", "0", "--patterns", "sa:16"]


def record(folder: Path) -> Any:
    return json.loads((folder / "short_prompts.json").read_text())


def test_patching_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, plain = [0.0], setups.applied

    @contextmanager
    def slow(model: PreTrainedModel, setup: Setup) -> Iterator[None]:
        now[0] += 1000
        with plain(model, setup):
            yield
        now[0] += 1000

    def clock() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(setups, "applied", slow)
    monkeypatch.setattr(time, "perf_counter", clock)
    options = [*SMALL, "--backends", "banded", "--out", str(tmp_path)]
    assert run_script(SCRIPT, options, monkeypatch) == 0
    found = record(tmp_path)
    assert [cell["setup"] for cell in found["cells"]] == ["stock", "sa:window=16,seed=0 | banded"]
    assert all(set(cell["seconds"]) == {1.0} for cell in found["cells"])
    assert found["random_weights"] is True


def test_without_a_time_of_the_stock_model_there_are_no_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = setups.applied

    @contextmanager
    def only_patched(model: PreTrainedModel, setup: Setup) -> Iterator[None]:
        if setup.pattern is None:
            raise RuntimeError("no kernel")
        with plain(model, setup):
            yield

    monkeypatch.setattr(setups, "applied", only_patched)
    checkpoint = str(save_tiny_checkpoint(tmp_path / "model"))
    options = [*SMALL, "--model", checkpoint, "--backends", "banded", "--out", str(tmp_path)]
    assert run_script(SCRIPT, options, monkeypatch) == 1
    stock, patched = record(tmp_path)["cells"]
    assert stock["failure"] == "RuntimeError: no kernel"
    assert patched["of_stock"] is None and patched["seconds"]
    assert record(tmp_path)["random_weights"] is False


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--patterns", "sa:sixty"], "sixty"),
        (["--backends", "bandit"], "unknown backend 'bandit'"),
        (["--prompts", "0"], "prompts must be a whole number of at least 1"),
        (["--out", f"{__file__}/out"], "cannot be written"),
        (["--model", "nowhere-to-be-found/at-all"], "nowhere-to-be-found"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "--model" not in options:
        monkeypatch.setattr("sa_patch.benchmark.prefill.models.make_model", pytest.fail)
    given = [*SMALL, "--out", str(tmp_path), *options]
    assert sentence in refusal(SCRIPT, given, monkeypatch, capfd)
