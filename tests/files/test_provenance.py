"""The manifest's facts: versions, machine, and the commit of the package itself."""

import subprocess
from pathlib import Path

import pytest
import torch

from sa_patch.files.provenance import code_digest, describe_session, git_state


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    return package


def test_a_clone_gives_its_commit_and_whether_the_package_differs(repository: Path) -> None:
    git(repository, "add", "__init__.py")
    git(repository, "commit", "-q", "-m", "first")
    state = git_state(repository)
    assert state is not None and state["dirty"] is False and len(state["commit"]) == 40
    (repository.parent / "elsewhere.txt").write_text("not the package")
    assert git_state(repository) == state
    (repository / "__init__.py").write_text("changed = True")
    assert git_state(repository) == {**state, "dirty": True}


def test_a_package_installed_inside_another_repository_has_no_commit(repository: Path) -> None:
    assert git_state(repository) is None


def test_no_repository_is_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None


def test_a_session_says_where_it_ran() -> None:
    session = describe_session(["sa-patch", "sweep", "demo"])
    assert session["command"] == ["sa-patch", "sweep", "demo"]
    for name in ("python", "sa_patch", "torch", "transformers", "lm_eval", "datasets"):
        assert session["versions"][name]
    assert session["hardware"]["cpu"] and session["hardware"]["cores"] >= 1
    assert session["hardware"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert session["started"].endswith("Z") and session["ended"] is None


def test_the_codes_digest_is_of_code_and_tasks_wherever_they_lie(tmp_path: Path) -> None:
    clone, installed = tmp_path / "clone", tmp_path / "installed"
    for package, tasks in (
        (clone / "sa_patch", clone / "eval" / "tasks"),
        (installed / "sa_patch", installed / "sa_patch" / "_data" / "tasks"),
    ):
        tasks.mkdir(parents=True)
        package.mkdir(exist_ok=True)
        (package / "code.py").write_text("a = 1")
        (tasks / "task.yaml").write_text("task: x")
        (tasks / "task.py").write_text("b = 1")
    before = code_digest(clone / "sa_patch", clone / "eval" / "tasks")
    data = installed / "sa_patch" / "_data" / "tasks"
    assert code_digest(installed / "sa_patch", data) == before
    (installed / "sa_patch" / "notes.txt").write_text("no code")
    assert code_digest(installed / "sa_patch", data) == before
    (data / "shared").write_text("limit: 1")
    changed = code_digest(installed / "sa_patch", data)
    (installed / "sa_patch" / "code.py").write_text("a = 2")
    assert len({before, changed, code_digest(installed / "sa_patch", data)}) == 3
    assert len(code_digest()) == 16
