"""lm-eval's index of its 14,000 task files, kept in the user's cache: making it takes seconds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import zlib
from importlib.metadata import version
from pathlib import Path

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from sa_patch.files.atomic_write import write_whole
from sa_patch.files.content_hash import cache_folder


def every_task(folder: Path) -> TaskManager:
    """lm-eval's tasks and those in `folder`; indexed anew only when one of their files changed."""
    folders = [Path(lm_eval.tasks.__file__).parent, folder.resolve()]
    names = hashlib.sha256(b"\0".join(map(os.fsencode, folders)))
    kept = cache_folder("lm_eval_tasks") / names.hexdigest()
    state = _state(folders)
    manager = _recall(kept, state)
    if manager is None:
        manager = TaskManager(include_path=folder)
        _keep(kept, state, manager)
    return manager


def _state(folders: list[Path]) -> bytes:
    """A digest of the path, size and time of change of every file, and of lm-eval's version."""
    state = hashlib.sha256(version("lm_eval").encode())
    for folder in folders:
        for place, below, files in os.walk(folder):
            below[:] = sorted(name for name in below if name != "__pycache__")
            for name in sorted(files):
                path = os.path.join(place, name)
                stat = os.stat(path)
                state.update(os.fsencode(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    return state.digest()


def _recall(kept: Path, state: bytes) -> TaskManager | None:
    # Whatever is wrong with the file (torn, foreign, of another version), the index is made anew.
    with contextlib.suppress(Exception):
        content = kept.read_bytes()
        if content.startswith(state):
            manager = pickle.loads(zlib.decompress(content[len(state) :]))
            if isinstance(manager, TaskManager):
                return manager
    return None


def _keep(kept: Path, state: bytes, manager: TaskManager) -> None:
    # Where nothing can be kept (a read-only or missing home), it is made again next time.
    if not kept.is_absolute():
        return
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, state + zlib.compress(pickle.dumps(manager), level=1))
