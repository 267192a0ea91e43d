"""Data folders are found in the clone, and a broken installation says so."""

from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.files import packaged as resources


def test_clone_folders() -> None:
    root = Path(__file__).resolve().parents[2]
    assert resources.configs_dir() == root / "configs"
    assert resources.tasks_dir() == root / "eval" / "tasks"


def test_wheel_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_data" / "configs").mkdir(parents=True)
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path)
    assert resources.configs_dir() == tmp_path / "_data" / "configs"


def test_a_foreign_folder_beside_the_package_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "sa_patch")
    with pytest.raises(UserError, match="lacks its data folder 'configs'.*reinstall"):
        resources.configs_dir()
