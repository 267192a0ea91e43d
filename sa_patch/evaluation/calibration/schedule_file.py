"""Schedule files: YAML whose ``layers`` say which layers are sparse; read, checked and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sa_patch.errors import UserError
from sa_patch.files.atomic_write import write_whole
from sa_patch.files.settings import read_yaml
from sa_patch.patching import Schedule

SIGNATURE = "# Written by sa-patch calibrate."


def read_layers(layers: Any) -> Schedule:
    """A `Schedule` from all that `patch_model` takes, or from the path of a YAML file.

    A schedule file, as ``sa-patch calibrate`` writes it, has a key ``layers`` with text, a list or
    a mapping of layers to patterns; its other keys are there for the reader.

    Raises:
        UserError: for layers of another form, or a file that cannot be read or has none.
    """
    if isinstance(layers, str) and Path(layers).suffix in (".yaml", ".yml"):
        return _read_file(Path(layers).expanduser())
    return Schedule.read(layers)


def _read_file(path: Path) -> Schedule:
    if not path.is_file():
        raise UserError(
            f"no schedule file {path}; give the path of a YAML file with a 'layers' key, or layers "
            "such as 4-35"
        )
    content = read_yaml(path)
    if not isinstance(content, Mapping) or content.get("layers") is None:
        raise UserError(f"{path} has no key 'layers'; write for example layers: 4-35")
    try:
        return Schedule.read(content["layers"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_schedule_file(path: Path) -> None:
    """Refuse to write a schedule over a file that is none, before anything is measured.

    Raises:
        UserError: if something else lies there.
    """
    if not path.exists():
        return
    try:
        ours = path.read_text(encoding="utf-8").startswith(SIGNATURE)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise UserError(
            f"{path} was not written by sa-patch calibrate and is left alone; give another --out"
        )


def write_schedule(path: Path, content: Mapping[str, Any], comments: list[str]) -> None:
    """A YAML file with a ``layers`` key, which every face of the program takes as ``layers``.

    Raises:
        UserError: if it cannot be written.
    """
    head = "\n".join([SIGNATURE, *(f"# {line}" for line in comments), ""])
    body = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (head + body).encode("utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); give another --out"
        ) from None
