"""A run that is killed and resumed ends with the weights of one that was not."""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sa_patch.errors import UserError
from sa_patch.training.pretraining.comparison import Run, train_missing
from sa_patch.training.pretraining.loop import pretrain
from sa_patch.training.pretraining.methods import Method
from sa_patch.training.pretraining.run_folder import RunFolder
from sa_patch.training.pretraining.settings import load_settings
from tests.training.tiny_run import weights, write_config


def learnt(run: RunFolder) -> dict[str, object]:
    """The result but for what is measured in seconds or names a time."""
    result = run.result()
    return {k: v for k, v in result.items() if k not in ("finished", "tokens_per_second")}


def assert_alike(ours: RunFolder, right: RunFolder) -> None:
    resumed, unbroken = weights(ours), weights(right)
    assert resumed.keys() == unbroken.keys() and len(unbroken) > 10
    for name, value in unbroken.items():
        assert torch.equal(resumed[name], value), name
    assert learnt(ours) == learnt(right)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no processes")
def test_killed_and_resumed_is_bit_identical_to_unbroken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(write_config(tmp_path, steps=40))
    run = Run(settings, Method.read("gated", settings.window), 0, tmp_path / "runs")
    core, deadline = max(os.sched_getaffinity(0)), time.monotonic() + 60
    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(train_missing, [run], [core], ["test"])
        # Between two checkpoints, so that some steps are lost and done again.
        while not run.folder.checkpoints() or run.folder.entries()[-1]["step"] % 3 == 0:
            assert not training.done() and time.monotonic() < deadline
            time.sleep(0.001)
        (process,) = multiprocessing.active_children()
        assert process.pid is not None and os.sched_getaffinity(process.pid) == {core}
        process.kill()
        with pytest.raises(UserError, match="was killed"):
            training.result()
    assert not run.folder.complete

    folder, method, corpus = run.folder.path, run.method, run.corpus
    resumed = pretrain(settings, method, 0, folder, corpus, ["test"])
    unbroken = pretrain(settings, method, 0, tmp_path / "unbroken", corpus, ["test"])
    assert_alike(resumed, unbroken)
    assert len(resumed.checkpoints()) == 2
    # Progress, and nothing of the libraries' own.
    told = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told if "40 of" in line] == ["step 40 of 40"] * 2
    assert [line for line in told if not line.startswith("step ")] == []
    steps = [entry["step"] for entry in resumed.entries() if "loss" in entry]
    assert steps == list(range(1, 41))


def test_patterns_of_a_resumed_run_are_those_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(write_config(tmp_path))
    method, corpus = Method.read("sa", settings.window), tmp_path / "corpus"
    unbroken = pretrain(settings, method, 0, tmp_path / "unbroken", corpus, ["test"])

    log = RunFolder.log

    def stop_at_step_8(self: RunFolder, entry: dict[str, object]) -> None:
        log(self, entry)
        if entry["step"] == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "log", stop_at_step_8)
        pretrain(settings, method, 0, tmp_path / "broken", corpus, ["test"])
    # A half-written checkpoint and a torn line are what a kill may leave.
    half = tmp_path / "broken" / "checkpoints" / ".step-9.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "broken" / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = pretrain(settings, method, 0, tmp_path / "broken", corpus, ["test"])
    assert_alike(resumed, unbroken)
