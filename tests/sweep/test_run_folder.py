"""The run folder: held by one process, a manifest before any cell."""

import json
import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.sweep.run_folder import RunFolder


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written .*choose another with --out"),
        RunFolder(tmp_path / "file" / "run").locked(),
    ):
        pass


def hold(path: Path, ready: Event) -> None:
    with RunFolder(path).locked():
        ready.set()
        signal.pause()


def test_one_process_at_a_time_and_a_killed_one_does_not_block(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready))
    other.start()
    assert ready.wait(60)
    with (
        pytest.raises(UserError, match=rf"another sweep \(process {other.pid}\) is writing"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with RunFolder(tmp_path / "run").locked():
        pass


def read_manifest(folder: RunFolder) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder.path / "manifest.json").read_text())
    return content


def test_the_manifest_is_there_first_and_completed_last(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked():
        assert folder.begin("demo", {"windows": [4]}, ["a", "b"], ["sa-patch"]) is None
        before = read_manifest(folder)
        folder.end(ran=2, failed=0, interrupted=False)
    assert before["planned"] == ["a", "b"] and before["ended"] is None
    after = read_manifest(folder)
    assert after["ended"] is not None
    assert {**after, "ended": None, "sessions": None} == {**before, "sessions": None}


def test_a_resumed_run_appends_a_session_and_keeps_its_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked():
        folder.begin("demo", {}, ["a"], ["first"])
    before = read_manifest(folder)
    with folder.locked():
        folder.begin("demo", {}, ["a"], ["second"])
        folder.end(ran=1, failed=0, interrupted=True)
    after = read_manifest(folder)
    sessions = after["sessions"]
    assert isinstance(sessions, list)
    assert [session["command"] for session in sessions] == [["first"], ["second"]]
    assert after["started"] == before["started"]
    assert after["ended"] is None and sessions[1]["interrupted"] is True


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sessions": 3}'])
def test_a_torn_manifest_is_reported_and_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    folder = RunFolder(tmp_path)
    with folder.locked():
        warning = folder.begin("demo", {}, [], [])
    assert warning is not None and "torn or foreign" in warning
    assert read_manifest(folder)["name"] == "demo"
