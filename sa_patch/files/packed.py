"""Many small JSON files of a folder packed into one, for runs that are published.

``cells.jsonl`` beside the folder ``cells/`` holds a line for each file: its name and its content.
What reads the files reads both; a file comes before the line of its name, so that a packed run can
be gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole


def packed_path(folder: Path) -> Path:
    """Where the files of a folder are packed."""
    return folder.with_name(folder.name + ".jsonl")


def stored_files(folder: Path) -> list[Path]:
    """Paths of the JSON files of a folder, packed ones as if they were there, by name."""
    names = {path.name for path in folder.glob("*.json")} | set(_packed(folder).contents)
    return [folder / name for name in sorted(names)]


def stored_text(path: Path) -> str:
    """What a file holds, or what it held when it was packed.

    Raises:
        FileNotFoundError: where there is neither.
        OSError, UnicodeDecodeError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        content = _packed(path.parent).contents.get(path.name)
        if content is None:
            raise
        return content


def torn_lines(folder: Path) -> tuple[int, ...]:
    """Numbers, from 1, of the lines of the packed file that tell no file's name and content.

    What such a line held counts as missing, since its name cannot be trusted either.
    """
    return _packed(folder).torn


def pack(folder: Path) -> Path:
    """Move the JSON files of a folder into its packed file; the folder goes if it is then empty.

    Raises:
        UserError: if there is nothing to pack, or a file or a packed line holds no JSON.
    """
    if torn := torn_lines(folder):
        raise UserError(
            f"{packed_path(folder)} has torn lines ({', '.join(map(str, torn))}), of which packing "
            "again would leave no trace; finish the run, and delete them before packing it"
        )
    files = stored_files(folder)
    if not files:
        raise UserError(f"{folder} holds no JSON files to pack")
    lines = []
    for file in files:
        try:
            content = json.loads(stored_text(file))
        except ValueError as error:
            raise UserError(
                f"{file} is torn ({error}); finish the run before packing it"
            ) from error
        line = {"name": file.name, "content": content}
        lines.append(json.dumps(line, separators=(",", ":"), ensure_ascii=False))
    target = packed_path(folder)
    write_whole(target, ("\n".join(lines) + "\n").encode())
    for file in files:
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return target


class _Packed(NamedTuple):
    """Contents by file name, and the numbers of the torn lines."""

    contents: Mapping[str, str]
    torn: tuple[int, ...]


def _packed(folder: Path) -> _Packed:
    path = packed_path(folder)
    try:
        about = path.stat()
    except OSError:
        return _Packed({}, ())
    return _read(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=8)
def _read(path: Path, changed: int, size: int) -> _Packed:
    contents, torn = {}, []
    # Not splitlines(), which cuts at characters that JSON text may hold, such as U+2028.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            contents[str(entry["name"])] = json.dumps(entry["content"])
        except (ValueError, KeyError, TypeError):
            torn.append(number)
    return _Packed(contents, tuple(torn))
