"""Files of a run packed into one: read as if they were there, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sa_patch.errors import UserError
from sa_patch.files.packed import pack, packed_path, stored_files, stored_text, torn_lines


def folder_of(tmp_path: Path, **contents: object) -> Path:
    folder = tmp_path / "cells"
    folder.mkdir()
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
    return folder


def test_packed_files_are_read_as_before(tmp_path: Path) -> None:
    contents = {"b": {"value": 0.1 + 0.2, "text": "naïve\n\u2028\x85"}, "a": [1, None]}
    folder = folder_of(tmp_path, **contents)
    names = stored_files(folder)
    assert pack(folder) == packed_path(folder) == tmp_path / "cells.jsonl"
    assert not folder.exists()
    assert stored_files(folder) == names == [folder / "a.json", folder / "b.json"]
    assert {path.stem: json.loads(stored_text(path)) for path in names} == contents


def test_a_file_comes_before_its_line_and_can_be_packed_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a=1, b=2)
    pack(folder)
    folder.mkdir()
    (folder / "b.json").write_text("3")
    (folder / "c.json").write_text("4")
    assert [stored_text(path) for path in stored_files(folder)] == ["1", "3", "4"]
    pack(folder)
    assert [stored_text(path) for path in stored_files(folder)] == ["1", "3", "4"]


def test_what_is_torn_is_not_packed_and_not_trusted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a=1)
    (folder / "b.json").write_text('{"id": ')
    with pytest.raises(UserError, match="is torn"):
        pack(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json"]
    (folder / "b.json").unlink()
    pack(folder)
    assert torn_lines(folder) == ()
    packed_path(folder).write_text(packed_path(folder).read_text() + '{"name": "c.json", "cont')
    assert stored_files(folder) == [folder / "a.json"]
    assert torn_lines(folder) == (2,)
    with pytest.raises(FileNotFoundError):
        stored_text(folder / "c.json")
    with pytest.raises(UserError, match=r"has torn lines \(2\)"):
        pack(folder)
    assert torn_lines(folder) == (2,)
    with pytest.raises(UserError, match="no JSON files"):
        pack(tmp_path / "nothing")
