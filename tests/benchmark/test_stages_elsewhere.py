"""Stages on a machine that is lent: terminated, without their device, gone on from an archive."""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_patch.benchmark.prefill.record import read_prefill
from sa_patch.benchmark.record import TIMED
from sa_patch.benchmark.stages import run as stages
from sa_patch.benchmark.stages.run import ARCHIVE, DeviceLost, run_stages
from sa_patch.benchmark.stages.stage import Found, Visit
from sa_patch.files.archive import unpack_archive
from tests.run_script import refusal, run_script


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def terminated_by_default() -> Iterator[None]:
    """What is terminated fails, instead of ending all tests."""

    def fail(*_: object) -> None:
        raise RuntimeError("terminated")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("terminated_by_default")
def test_what_is_terminated_goes_on_from_its_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = stages._stage

    def until_terminated(visit: Visit) -> Found:
        def say(line: str) -> None:
            visit.say(line)
            if line.startswith("n = 128: timing"):
                os.kill(os.getpid(), signal.SIGTERM)

        return find("model")(dataclasses.replace(visit, say=say))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(stages, "_stage", lambda name: until_terminated)
    given = ["--device", "cpu", "--small", "--stages", "model", "--out"]
    assert run_script("gpu_stages", [*given, str(tmp_path / "one")], monkeypatch) == 130
    assert "interrupted; what was measured is in" in capfd.readouterr().err
    (ended,) = read(tmp_path / "one/stages.json")["stages"].values()
    assert (ended["status"], ended["reason"]) == ("partly", "interrupted")
    monkeypatch.setattr(stages, "_stage", find)
    resumed = ["--resume", str(tmp_path / "one" / ARCHIVE)]
    assert run_script("gpu_stages", [*given, str(tmp_path / "two"), *resumed], monkeypatch) == 0
    for call in ("one", "two"):
        unpack_archive(tmp_path / call / ARCHIVE, tmp_path / f"all of {call}")
    first, whole = (
        read_prefill(tmp_path / f"all of {call}" / "stages/model.json") for call in ("one", "two")
    )
    assert {cell.n for cell in first.where(status=TIMED)} == {64}
    assert whole.complete and whole.lengths(status=TIMED) == [64, 128]
    assert [c.seconds for c in whole.where(n=64)] == [c.seconds for c in first.where(n=64)]
    # Where nothing is left to do, the archive is there all the same.
    resumed = ["--resume", str(tmp_path / "two" / ARCHIVE)]
    assert run_script("gpu_stages", [*given, str(tmp_path / "three"), *resumed], monkeypatch) == 0
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {path.name for path in (tmp_path / "three").iterdir()} == names
    # The same --out goes on by itself.
    capfd.readouterr()
    assert run_script("gpu_stages", [*given, str(tmp_path / "two")], monkeypatch) == 0
    assert "model: complete from an earlier call" in capfd.readouterr().out


def test_an_archive_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "torn").write_bytes(b"torn")
    for name in ("missing", "torn"):
        given = ["--small", "--out", str(tmp_path / "out"), "--resume", str(tmp_path / name)]
        line = refusal("gpu_stages", given, monkeypatch, capfd)
        assert line.startswith(f"gpu_stages: error: cannot unpack the archive {tmp_path / name} (")


def test_the_archive_is_kept_up_to_date_within_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(visit: Visit) -> Found:
        (visit.out / "attention.md").write_text("measured")
        visit.say("n = 64")
        assert (sent / "attention.md").read_text() == "measured"
        unpack_archive(sent / ARCHIVE, tmp_path)
        assert (tmp_path / "stages/attention.md").read_text() == "measured"
        return Found([])

    sent = tmp_path / "sent"
    monkeypatch.setattr(stages, "_stage", lambda name: killed)
    monkeypatch.setattr(stages, "SEND_SECONDS", 0.0)
    out = tmp_path / "out"
    assert run_stages(["check"], out, small=True, device="cpu", sent=sent, say=lambda _: None) == 0


def test_a_stage_that_lost_the_device_counts_in_the_process_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(visit: Visit) -> Found:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(stages, "_stage", lambda name: broken)
    monkeypatch.setattr(stages, "device_lives", lambda device: False)
    said: list[str] = []
    with pytest.raises(DeviceLost) as lost:
        run_stages(["check", "model"], tmp_path, small=True, device="cpu", say=said.append)
    assert lost.value.rest == ["model"]
    monkeypatch.setattr(stages, "_stage", lambda name: lambda visit: Found([("speed", "1 ms")]))
    assert run_stages(["model"], tmp_path, small=True, device="cpu", say=said.append) == 1
    (told,) = [line for line in said if line.startswith("check: failed in")]
    assert "an illegal memory access" in told and said.index(told) > said.index("model: 180 s")


def test_a_new_process_runs_the_stages_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(stages, "_stage", lambda name: lambda visit: Found([]))
    monkeypatch.setattr(stages, "device_lives", lambda device: False)
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))
    given = ["--small", "--device", "cpu", "--out", str(tmp_path), "--stages", "check,model,moe"]
    run_script("gpu_stages", given, monkeypatch)
    ((_, script, *options),) = started
    assert script.endswith("scripts/gpu_stages")
    assert options == [*given, "--stages", "model,moe"]
    assert list(read(tmp_path / "stages.json")["stages"]) == ["check"]


def test_kernels_are_interpreted_where_no_gpu_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str | None] = []

    def stage(visit: Visit) -> Found:
        found.append(os.environ.get("TRITON_INTERPRET"))
        return Found([])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(stages, "_stage", lambda name: stage)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    given = ["--small", "--out", str(tmp_path), "--stages", "tune"]
    assert run_script("gpu_stages", given, monkeypatch) == 0
    assert found == ["1"]
