"""scripts/compile_kernels: its results are whole, and a bad folder is refused at once."""

import os
import runpy
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from tests.run_script import SCRIPTS, run_script


def test_results_that_cannot_be_written_leave_the_ones_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = runpy.run_path(str(SCRIPTS / "compile_kernels"))["write"]
    write(tmp_path, "compile", {}, "kernels", [], ["# Old"])

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path, "compile", {}, "kernels", [], ["# New"])
    assert (tmp_path / "compile.md").read_text() == "# Old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compile.json", "compile.md"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sa_patch.benchmark.compilation.triton.compile_in_child", pytest.fail)
    options = ["--backends", "triton", "--out", f"{__file__}/out"]
    assert run_script("compile_kernels", options, monkeypatch) == 2
    assert "cannot be written" in capfd.readouterr().err
