"""scripts/pack_run: whole runs are packed, and none that is being written."""

from pathlib import Path

import pytest

from sa_patch.files.packed import stored_files
from sa_patch.sweep.run_folder import hold_folder
from tests.run_script import refusal, run_script


def test_a_run_is_packed_once_nothing_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cells = tmp_path / "cells"
    cells.mkdir()
    (cells / "a.json").write_text("{}")
    with hold_folder(tmp_path, "sweep"):
        said = refusal("pack_run", [str(tmp_path)], monkeypatch, capfd)
    assert "another sweep" in said and (cells / "a.json").exists()
    assert run_script("pack_run", [str(tmp_path)], monkeypatch) == 0
    assert not cells.exists() and stored_files(cells) == [cells / "a.json"]
