"""Files that appear whole or not at all, and folders that several processes check at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sa_patch.files.artifacts import check_folder
from sa_patch.files.atomic_write import write_whole


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.mkdir()
    with pytest.raises(OSError):
        write_whole(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_many_may_check_one_folder_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: check_folder(tmp_path / "runs"), range(200)):
            pass
    assert not list((tmp_path / "runs").iterdir())
