"""scripts/time_run on a tiny model: patterns of a run beside stock, once they are right."""

import dataclasses
import json
from pathlib import Path

import pytest

from sa_patch.kernels import BACKENDS
from tests.run_script import refusal, run_script
from tests.sweep import run_builder
from tests.sweep.run_builder import RunBuilder
from tests.tiny_checkpoint import save_tiny_checkpoint

PATTERNS = ("sinks:size=1+swa:window=16", "vertical_slash:vertical=4,slash=4")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    task = "stdlib_position_128"
    monkeypatch.setitem(run_builder.TASKS, task, ("perplexity,none", None, 7.0, 128))
    builder = RunBuilder(tmp_path / "run", model_name=str(save_tiny_checkpoint(tmp_path / "model")))
    for pattern in PATTERNS:
        builder.add(pattern, task, 8.0, share=0.25)
    return builder.write()


def options(run: Path, out: Path, n: str = "128") -> list[str]:
    return [str(run), "--n", n, "--rounds", "2", "--out", str(out)]


def test_patterns_stand_beside_stock(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run_script("time_run", options(run, out), monkeypatch) == 0
    result = json.loads((out / "times.json").read_text())
    timed = {one["name"]: one for one in result["timed"]}
    assert set(timed) == {"stock", *PATTERNS}
    assert result["not_timed"] == []
    stock = timed["stock"]
    assert stock["attention"]["of_stock"] == stock["prefill"]["of_stock"] == [1.0, 1.0]
    for one in timed.values():
        for part in ("attention", "prefill"):
            base = stock[part]["seconds"]
            ratios = [a / b for a, b in zip(one[part]["seconds"], base, strict=True)]
            assert one[part]["of_stock"] == pytest.approx(ratios)
        assert 0 < max(one["attention"]["seconds"]) < max(one["prefill"]["seconds"])
    assert timed[PATTERNS[0]]["flops_share"] == 0.25
    assert timed[PATTERNS[0]]["visited_share"] == 0.625
    table = (out / "times.md").read_text()
    assert "| `vertical_slash:vertical=4,slash=4` | 62.5% | 25.0% |" in table


def test_what_is_wrong_is_not_timed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, backend in BACKENDS.items():
        wrong = dataclasses.replace(
            backend, attend=lambda *a, f=backend.attend, **kw: 1.5 * f(*a, **kw)
        )
        monkeypatch.setitem(BACKENDS, name, wrong)
    out = tmp_path / "out"
    assert run_script("time_run", options(run, out), monkeypatch) == 0
    result = json.loads((out / "times.json").read_text())
    assert [one["name"] for one in result["timed"]] == ["stock"]
    assert all(one["reason"].startswith("off by") for one in result["not_timed"])
    assert "## Not timed" in (out / "times.md").read_text()


def test_a_length_that_no_cell_has_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refusal("time_run", options(run, tmp_path / "out", n="64"), monkeypatch, capfd)
    assert (
        said == "time_run: error: no cell of these runs has 64 tokens; give --n the length of one"
    )
