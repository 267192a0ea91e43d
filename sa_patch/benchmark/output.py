"""Where results go: files that are whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole

Say = Callable[[str], None]
"""Takes a line of progress; by default it is printed at once."""
say_line: Say = partial(print, flush=True)


def write_results(
    stem: Path,
    content: dict[str, Any],
    markdown: str | None = None,
    draw: Callable[[], bytes] | None = None,
) -> tuple[Path, ...]:
    """Write ``STEM.json``, ``STEM.md`` and ``STEM.png``, as far as they are given.

    Args:
        draw: makes the PNG; it imports matplotlib, and where that is missing there is no figure.

    Raises:
        UserError: if the folder cannot be written.
    """
    files = {".json": (json.dumps(content, indent=1) + "\n").encode()}
    if markdown is not None:
        files[".md"] = markdown.encode()
    if draw is not None:
        try:
            files[".png"] = draw()
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
    written = {stem.with_name(stem.name + suffix): data for suffix, data in files.items()}
    try:
        for path, data in written.items():
            write_whole(path, data)
    except OSError as error:
        raise UserError(f"cannot write into {stem.parent}: {error.strerror}") from error
    return tuple(written)


def read_content(path: Path, kind: str, schema: int) -> dict[str, Any]:
    """What `write_results` wrote into a JSON file of this kind and schema.

    Raises:
        UserError: if the file is missing, torn, or of another kind or schema.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as a benchmark: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise UserError(f"{path} is no {kind}")
    if content.get("schema") != schema:
        raise UserError(f"{path} has schema {content.get('schema')}; this version reads {schema}")
    return content
