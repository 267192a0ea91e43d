"""A sweep answers saturated prompts once, whoever comes first, and can be told to run them all."""

import json
from pathlib import Path
from typing import Any

import pytest

from sa_patch.cli.command import main
from sa_patch.sweep.plan import make_plan
from sa_patch.sweep.run import run_sweep
from tests.sweep.small_sweep import scored, sweep_of

TASKS = ["needle_128", "needle_256", "stdlib_perplexity_256"]


def reused(folder: Path) -> dict[str, float]:
    cells = [json.loads(path.read_text()) for path in (folder / "cells").iterdir()]
    found: dict[str, float] = {}
    for cell in cells:
        task = cell["cell"]["pattern"] + " " + cell["cell"]["task"]
        found[task] = cell["measured"]["reused_fraction"]
    return found


def sweep(checkpoint: Path, out: Path, **options: Any) -> None:
    # One sequence to a batch: answers are then the same to the last bit.
    config = sweep_of(checkpoint, windows=[200], tasks=TASKS, batch_size=1)
    assert run_sweep(config, make_plan(config), out, **options).exit_status == 0


@pytest.fixture(scope="module")
def with_reuse(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reuse") / "run"
    sweep(checkpoint, out)
    return out


def test_cells_are_the_same_as_without(checkpoint: Path, with_reuse: Path, tmp_path: Path) -> None:
    sweep(checkpoint, tmp_path / "run", reuse=False)
    assert scored(tmp_path / "run") == scored(with_reuse)
    assert set(reused(tmp_path / "run").values()) == {0}
    assert not (tmp_path / "run" / "answers").exists()
    shares = reused(with_reuse)
    assert shares["full needle_128"] == 0
    assert shares["sa:window=200,seed=0 needle_128"] == shares["swa:window=200 needle_128"] == 1
    assert shares["swa:window=200 stdlib_perplexity_256"] == 0


def test_a_later_sweep_into_the_folder_finds_the_answers(
    checkpoint: Path, with_reuse: Path
) -> None:
    changes = {"windows": [190], "methods": ["swa"], "tasks": ["needle_128"]}
    config = sweep_of(checkpoint, batch_size=1, **changes)
    run_sweep(config, make_plan(config), with_reuse)
    assert reused(with_reuse)["swa:window=190 needle_128"] == 1


def test_the_command_can_be_told_to_run_every_prompt(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"model: {checkpoint}\ndtype: float32\nmethods: [full, 'swa:200']\ntasks: [needle_128]\n"
        "limit: 1\n"
    )
    assert main(["sweep", str(file), "--out", str(tmp_path / "run"), "--no-reuse"]) == 0
    assert set(reused(tmp_path / "run").values()) == {0}
