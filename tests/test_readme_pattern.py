"""The worked example of a new pattern in patterns/README.md, followed word by word in a copy."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"## Adding a pattern\n(.*)", re.DOTALL)
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def section() -> str:
    found = SECTION.search(
        (ROOT / "sa_patch" / "patterns" / "README.md").read_text(encoding="utf-8")
    )
    assert found
    return found[1]


def replaced(text: str, diff: str) -> str:
    """``text`` with each run of "-" lines of ``diff`` replaced by the "+" lines that follow."""
    changes = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE)
    assert changes
    for old, new in changes:
        before, after = (re.sub(r"^.", "", part, flags=re.MULTILINE) for part in (old, new))
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package to which the section's changes were made."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("sa_patch", "configs", "eval/tasks", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    text = section()
    (kind, code), (diff_kind, diff), _ = BLOCK.findall(text)
    assert (kind, diff_kind) == ("python", "diff")
    new_file, registry = re.findall(r"`(sa_patch/patterns/\w+\.py)`:", text)
    (copy / new_file).write_text(code, encoding="utf-8")
    old = (copy / registry).read_text(encoding="utf-8")
    (copy / registry).write_text(replaced(old, diff), encoding="utf-8")
    return copy


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return processes.run(*words, cwd=copy, environment={"PYTHONPATH": str(copy)})


def test_its_own_check_holds_and_would_find_a_wrong_budget(followed: Path) -> None:
    check = BLOCK.findall(section())[2][1]
    wrong = check.replace("(1000)[0]", "(1000)[0].add(1)")
    done = run(
        followed,
        "-c",
        f"import sa_patch; print(sa_patch.__file__)\n{check}\nprint('it holds')\n{wrong}",
    )
    assert str(followed) in done.stdout and "it holds" in done.stdout, done.stderr
    assert "AssertionError" in done.stderr


def test_its_keys_in_unions_are_counted(followed: Path) -> None:
    check = (
        "import torch\n"
        "from sa_patch.patterns import parse_pattern\n"
        "for text in ('sinks:4+swa:8+dilated:8,4', 'dilated:8,4+dilated:5,3'):\n"
        "    union = parse_pattern(text)\n"
        "    seen = union.visible(torch.arange(64), 64)\n"
        "    assert torch.equal(union.count_visible(64), seen.sum(-1))\n"
        "print('counted')"
    )
    done = run(followed, "-c", check)
    assert "counted" in done.stdout, done.stderr


def test_its_command_generates(followed: Path, checkpoint: Path) -> None:
    (command,) = re.findall(r"^    sa-patch (.*)$", section(), re.MULTILINE)
    # Another model than its own, which takes longer to load than all the rest.
    words = shlex.split(command.replace("smollm2-135m", str(checkpoint)))
    done = run(followed, "-m", "sa_patch", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_command_lists_and_refuses_as_for_any_pattern(followed: Path) -> None:
    listed = run(followed, "-m", "sa_patch", "methods")
    assert "dilated" in listed.stdout, listed.stderr
    refused = "from sa_patch.patterns import parse_pattern; parse_pattern('dilated:0')"
    wrong = run(followed, "-c", refused)
    assert "window must be a whole number of at least 1, got 0" in wrong.stderr


def test_the_laws_ask_to_be_taught_the_new_pattern(followed: Path) -> None:
    laws = "tests/laws/test_budget.py"
    done = run(followed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", laws)
    assert done.returncode != 0
    assert "dilated" in done.stdout


def test_the_new_file_is_clean(followed: Path) -> None:
    new_file = "sa_patch/patterns/dilated.py"
    for words in (("check",), ("format", "--check")):
        done = run(followed, "-m", "ruff", *words, new_file)
        assert done.returncode == 0, done.stdout
