"""A folder of files as one archive, for machines that give back a few files only."""

from __future__ import annotations

import contextlib
import io
import tarfile
import zlib
from pathlib import Path

from sa_patch.errors import UserError, one_line
from sa_patch.files.atomic_write import write_whole


def write_archive(archive: Path, folder: Path, name: str) -> None:
    """Put the files of `folder` below ``NAME/`` of a ``.tar.gz``, whole or not at all.

    Others may write into the folder meanwhile: their temporary files are left out.

    Raises:
        UserError: if the archive cannot be written.
    """
    held = io.BytesIO()
    try:
        with tarfile.open(fileobj=held, mode="w:gz") as tar:
            for path in sorted(folder.rglob("*")):
                if path.suffix != ".tmp":
                    # What was renamed or deleted since it was listed.
                    with contextlib.suppress(FileNotFoundError):
                        tar.add(path, f"{name}/{path.relative_to(folder)}", recursive=False)
        write_whole(archive, held.getvalue())
    except OSError as error:
        raise UserError(f"cannot write the archive {archive} ({one_line(error)})") from error


def unpack_archive(archive: Path, folder: Path) -> None:
    """Unpack into `folder` what `write_archive` wrote.

    Raises:
        UserError: if the archive is missing or damaged, or the folder cannot be written.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"cannot unpack the archive {archive} ({one_line(error)})") from error
