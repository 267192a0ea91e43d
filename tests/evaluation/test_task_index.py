"""lm-eval's index is read from the user's cache, and never when a task's file is another by now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from sa_patch.evaluation.tasks import task_index


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[TaskManager]]:
    """The indexes that were made; lm-eval's own files are left out of them, for speed."""
    every: list[TaskManager] = []

    class Counted(TaskManager):
        def __init__(self, include_path: Path) -> None:
            super().__init__(include_path=include_path, include_defaults=False)
            every.append(self)

    # Pickle looks classes up by name.
    Counted.__qualname__, Counted.__module__ = "TaskManager", task_index.__name__
    monkeypatch.setattr(task_index, "TaskManager", Counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield every


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "base").write_text("output_type: generate_until\n")
    (folder / "one.yaml").write_text("task: one\ninclude: base\n")
    return folder


def kept(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "sa_patch" / "lm_eval_tasks").iterdir()
    return file


def test_it_is_made_once_and_read_as_it_was(made: list[TaskManager], tasks: Path) -> None:
    first, second = task_index.every_task(tasks), task_index.every_task(tasks)
    assert made == [first]
    assert second.task_index == first.task_index
    assert second.all_tasks == ["one"]


@pytest.mark.parametrize("changed", ["a new task", "an included file", "a file that is gone"])
def test_a_changed_file_is_seen(changed: str, made: list[TaskManager], tasks: Path) -> None:
    task_index.every_task(tasks)
    if changed == "a new task":
        (tasks / "two.yaml").write_text("task: two\n")
    elif changed == "an included file":
        (tasks / "base").write_text("output_type: multiple_choice\n")
    else:
        (tasks / "one.yaml").unlink()
    assert (
        task_index.every_task(tasks).task_index
        == TaskManager(include_path=tasks, include_defaults=False).task_index
    )
    assert len(made) == 2


def test_another_lm_eval_makes_its_own(
    made: list[TaskManager], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_index.every_task(tasks)
    monkeypatch.setattr(task_index, "version", lambda _: "0.0")
    task_index.every_task(tasks)
    assert len(made) == 2


def test_a_torn_or_foreign_file_is_replaced(
    made: list[TaskManager], tasks: Path, tmp_path: Path
) -> None:
    task_index.every_task(tasks)
    whole = kept(tmp_path).read_bytes()
    for content in (b"", whole[:-9], whole[:32] + b"no index"):
        kept(tmp_path).write_bytes(content)
        assert task_index.every_task(tasks).all_tasks == ["one"]
        assert kept(tmp_path).read_bytes() == whole
    assert len(made) == 4


def test_it_is_made_where_nothing_can_be_kept(
    made: list[TaskManager], tasks: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    assert task_index.every_task(tasks).all_tasks == ["one"]
