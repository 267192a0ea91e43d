"""The files of a benchmark."""

import json
from pathlib import Path

import pytest

from sa_patch.benchmark.record import write_results


def test_numbers_are_written_before_anything_is_drawn(tmp_path: Path) -> None:
    def draw() -> bytes:
        assert json.loads((tmp_path / "it.json").read_text()) == {"ms": 1}
        assert (tmp_path / "it.md").read_text() == "1 ms"
        raise ValueError("no room for a legend")

    with pytest.raises(ValueError, match="legend"):
        write_results(tmp_path / "it", {"ms": 1}, "1 ms", draw)
    assert {path.name for path in tmp_path.iterdir()} == {"it.json", "it.md"}


def test_without_matplotlib_there_is_no_figure(tmp_path: Path) -> None:
    def draw() -> bytes:
        raise ImportError("no module", name="matplotlib.figure")

    stem = tmp_path / "it"
    assert write_results(stem, {}, None, draw) == (tmp_path / "it.json",)
    assert write_results(stem, {}, None, lambda: b"png")[1].read_bytes() == b"png"
