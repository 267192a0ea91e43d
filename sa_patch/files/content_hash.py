"""The sha256 of files, remembered between runs: a model is hashed once and not each time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sa_patch.errors import UserError


def cache_folder(kind: str) -> Path:
    """Where files of a kind are kept: below ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "sa_patch" / kind


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's content; remembered for its path, size and time of change.

    Raises:
        UserError: if the file cannot be read.
    """
    path = path.resolve()
    try:
        stat = path.stat()
        key = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
        memory = cache_folder("sha256") / hashlib.sha256(os.fsencode(key)).hexdigest()
        known = _recall(memory)
        if known is not None:
            return known
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    _keep(memory, digest)
    return digest


def _recall(memory: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = memory.read_text(encoding="ascii")
        # A torn or foreign file here must not become a model's identity.
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    return None


def _keep(memory: Path, digest: str) -> None:
    # Where nothing can be kept (a read-only or missing home), it is computed again next time.
    if not memory.is_absolute():
        return
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=memory.parent)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(digest)
        os.replace(temporary, memory)


def files_sha256(files: Iterable[Path], root: Path) -> str:
    """One hex sha256 over the names (below `root`) and contents of several files."""
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path.relative_to(root).as_posix()} {file_sha256(path)}\n".encode())
    return whole.hexdigest()
