"""The wheel works outside a clone: it carries the configurations and the task files."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def files_under(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(target), str(ROOT)]
    subprocess.run(command, check=True, cwd=target)
    (built,) = target.glob("sa_patch-*.whl")
    return built


def test_wheel_holds_package_configs_and_tasks_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"sa_patch/{name}" for name in files_under(ROOT / "sa_patch")}
    expected |= {f"sa_patch/_data/configs/{name}" for name in files_under(ROOT / "configs")}
    expected |= {f"sa_patch/_data/tasks/{name}" for name in files_under(ROOT / "eval" / "tasks")}
    assert "sa_patch/_data/configs/demo.yaml" in names
    assert names == expected


def test_wheel_finds_its_own_data(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = "from sa_patch.files.packaged import *; print(configs_dir()); print(tasks_dir())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    data = tmp_path.resolve() / "site" / "sa_patch" / "_data"
    assert done.stdout.split() == [str(data / "configs"), str(data / "tasks")]


def test_wheel_declares_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "sa-patch = sa_patch.cli.command:main" in archive.read(name).decode()
