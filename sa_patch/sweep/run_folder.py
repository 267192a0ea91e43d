"""A run folder on disk: its lock, its manifest, its cell files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import remove_leftovers, write_json
from sa_patch.files.provenance import describe_session, now
from sa_patch.sweep.cells import SCHEMA, Found, read_cell


class RunFolder:
    """``RUN/manifest.json``, ``RUN/cells/<id>.json``, ``RUN/answers/`` that full attention gave,
    and, for cells that failed, ``RUN/logs/``."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.cells = self.path / "cells"
        self.logs = self.path / "logs"
        self.answers = self.path / "answers"

    def find(self, identifier: str, cell: Mapping[str, Any]) -> Found:
        """What is already there for a cell; see `sa_patch.sweep.cells.read_cell`."""
        return read_cell(self.cells / f"{identifier}.json", cell)

    def save(self, identifier: str, data: Mapping[str, Any]) -> None:
        write_json(self.cells / f"{identifier}.json", data)

    def save_log(self, identifier: str, text: str) -> Path:
        self.logs.mkdir(exist_ok=True)
        path = self.logs / f"{identifier}.log"
        path.write_text(text, encoding="utf-8", errors="replace")
        return path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it for this process alone.

        The lock belongs to the open file, so that it ends with the process, however that ends.

        Raises:
            UserError: if the folder cannot be written, or another process is writing it.
        """
        with hold_folder(self.path, "sweep"):
            self.cells.mkdir(exist_ok=True)
            remove_leftovers(self.path)
            remove_leftovers(self.cells)
            remove_leftovers(self.answers)
            yield

    def begin(
        self, name: str, config: Mapping[str, Any], planned: Sequence[str], command: Sequence[str]
    ) -> str | None:
        """Write the manifest before any cell; a resumed run gets a further session.

        Returns:
            A sentence if an unreadable manifest had to be replaced, else None.
        """
        sessions: list[Any] = []
        started, warning = None, None
        try:
            before = json.loads(self._manifest.read_text(encoding="utf-8"))
            sessions, started = list(before["sessions"]), before["started"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            warning = f"{self._manifest} was torn or foreign, and is written anew"
        session = describe_session(command)
        self._content: dict[str, Any] = {
            "schema": SCHEMA,
            "name": name,
            "started": started or session["started"],
            **{key: session[key] for key in ("ended", "command", "versions", "git", "hardware")},
            "config": dict(config),
            "planned": list(planned),
            "sessions": [*sessions, session],
        }
        write_json(self._manifest, self._content)
        return warning

    def end(self, *, ran: int, failed: int, interrupted: bool) -> None:
        """Complete this session in the manifest."""
        ended = now()
        self._content["sessions"][-1].update(
            ended=ended, ran=ran, failed=failed, interrupted=interrupted
        )
        self._content["ended"] = None if interrupted else ended
        write_json(self._manifest, self._content)

    @property
    def _manifest(self) -> Path:
        return self.path / "manifest.json"


@contextmanager
def hold_folder(folder: Path, work: str) -> Iterator[None]:
    """Make a folder and hold it for this process alone; see `RunFolder.locked`.

    Args:
        work: what writes such folders, for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be written ({error.strerror}); "
            "choose another with --out"
        ) from error
    with lock:
        if not _lock(lock):
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise UserError(
                f"another {work} (process {holder}) is writing {folder}; wait for it, or "
                "choose another folder"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _lock(file: Any) -> bool:
    """Whether the file is now ours; True as well where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
