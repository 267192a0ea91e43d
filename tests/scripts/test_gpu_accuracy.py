"""scripts/gpu_accuracy: what goes to the machine that is lent, and what comes back."""

import runpy
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.run_script import SCRIPTS, refusal, run_script


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pieces, made where an earlier run and its pieces lay."""
    for name in ("data", "lm-eval", "pieces"):
        (tmp_path / name).mkdir()
    (tmp_path / "model.gguf").write_bytes(b"model")
    for name in ("accuracy.tar.gz", "accuracy.00", "accuracy.07"):
        (tmp_path / "pieces" / name).write_bytes(b"earlier")
    given = [
        *("--data", str(tmp_path / "data"), "--model", str(tmp_path / "model.gguf")),
        *("--lm-eval", str(tmp_path / "lm-eval"), "--out", str(tmp_path / "pieces")),
    ]
    assert run_script("gpu_accuracy", ["pack", *given], monkeypatch) == 0
    return tmp_path / "pieces"


def test_packing_leaves_the_results_of_a_run(packed: Path) -> None:
    found = {path.name for path in packed.iterdir()}
    assert found == {"accuracy.00", "SHA256SUMS", "accuracy.tar.gz"}
    assert (packed / "accuracy.tar.gz").read_bytes() == b"earlier"
    assert (packed / "accuracy.00").read_bytes() != b"earlier"


def running(folder: Path, *more: str) -> list[str]:
    given = ["--pieces", str(folder), "--work", str(folder.parent / "work"), "--seconds", "1"]
    return ["run", *given, "--out", str(folder.parent / "out"), *more]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda pieces: (pieces / "SHA256SUMS").unlink(), "SHA256SUMS is missing; give --pieces"),
        (lambda pieces: (pieces / "accuracy.00").unlink(), "0 of 1 pieces are in"),
        (lambda pieces: (pieces / "accuracy.00").write_bytes(b"torn"), "is damaged"),
    ],
    ids=["no sums", "no piece", "torn piece"],
)
def test_pieces_that_are_missing_are_one_sentence(
    spoil: Any,
    words: str,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil(packed)
    capfd.readouterr()
    line = refusal("gpu_accuracy", running(packed), monkeypatch, capfd)
    assert line.startswith("gpu_accuracy: error: ") and words in line
    assert not (packed.parent / "out").exists()


def test_an_archive_that_is_missing_is_one_sentence(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    digest = (packed / "SHA256SUMS").read_text().split()[0]
    (packed.parent / "work").mkdir()
    (packed.parent / "work/unpacked").write_text(digest)
    capfd.readouterr()
    given = running(packed, "--resume", str(packed / "none.tar.gz"))
    line = refusal("gpu_accuracy", given, monkeypatch, capfd)
    assert line.startswith("gpu_accuracy: error: cannot unpack the archive")


def test_what_is_to_be_packed_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    there, missing = str(tmp_path), str(tmp_path / "model.gguf")
    given = ["pack", "--data", there, "--model", missing, "--lm-eval", there, "--out", there]
    line = refusal("gpu_accuracy", given, monkeypatch, capfd)
    assert line == f"gpu_accuracy: error: there is no {missing} to pack"


def test_results_are_packed_while_the_sweep_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    script = runpy.run_path(str(SCRIPTS / "gpu_accuracy"), run_name="gpu_accuracy")
    monkeypatch.setitem(script["Keeping"].run.__globals__, "KEEP_SECONDS", 0.0)
    closed: list[bool] = []

    class Cells:
        def run(self, *given: object) -> Iterator[object]:
            try:
                yield from given
            finally:
                closed.append(True)

    folder, archive = tmp_path / "run", tmp_path / "accuracy.tar.gz"
    (folder / "cells").mkdir(parents=True)
    (folder / "cells" / ".two.json-x.tmp").write_text("half of it")
    events = script["Keeping"](Cells(), folder, archive).run("one", "two", "three")
    assert next(events) == "one" and not archive.exists()
    (folder / "cells/one.json").write_text("{}")
    assert next(events) == "two"
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["run/cells", "run/cells/one.json"]
    assert not closed
    # A command that is ended leaves nothing running.
    events.close()
    assert closed == [True]
