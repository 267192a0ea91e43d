"""Local copies of data sets, which unmodified task files of lm-eval read by relative paths."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sa_patch.errors import UserError


@contextlib.contextmanager
def working_directory(folder: Path | None) -> Iterator[None]:
    """Be in `folder` for a while; None stays where we are."""
    if folder is None:
        yield
        return
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def reading_copies(folder: Path | None, names: Iterable[str]) -> Iterator[None]:
    """Be in `folder`, and have `datasets` read what lies there now.

    It keeps what it has read by a data set's name, so that another copy, or the same one changed,
    would be taken for the first: its cache gets a place for each state of the files.
    """
    if folder is None:
        yield
        return
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(before) / f"sa_patch-{_state(folder, names)}"
    try:
        with working_directory(folder):
            yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def _state(folder: Path, names: Iterable[str]) -> str:
    """A hash of files' places, sizes and times."""
    state = hashlib.sha256(str(folder).encode())
    for name in names:
        for file in sorted(path for path in (folder / name).rglob("*") if path.is_file()):
            known = file.stat()
            state.update(f"{file} {known.st_size} {known.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


class Benchmarks:
    """A folder of local data sets laid out like their hub repositories (``Rowan/hellaswag``).

    Raises:
        UserError: if it is no folder.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise UserError(
                f"no benchmarks folder at {folder}; give a folder that holds data sets laid out "
                "like their hub repositories, for example Rowan/hellaswag"
            )
        self._digests: dict[str, str] = {}

    def digest(self, task: str, datasets: Iterable[str]) -> str | None:
        """A hash of the data sets that a task reads from here; None if it brings its own.

        Raises:
            UserError: if a data set of the task is missing.
        """
        needed = [name for name in datasets if "/" in name]
        for name in needed:
            if name not in self._digests:
                self._digests[name] = self._hash(name, task)
        joined = ",".join(f"{name}={self._digests[name]}" for name in needed)
        return hashlib.sha256(joined.encode()).hexdigest()[:16] if needed else None

    def _hash(self, name: str, task: str) -> str:
        root = self.folder / name
        if not root.is_dir():
            raise UserError(
                f"the benchmarks folder {self.folder} has no {name}, which task {task!r} reads; "
                "add a copy laid out like the hub repository of that name, or leave the task out"
            )
        whole = hashlib.sha256()
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            whole.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
        return whole.hexdigest()
