"""Schedules in files: a YAML file whose ``layers`` say which layers are sparse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_patch.errors import UserError
from sa_patch.files.settings import read_yaml
from sa_patch.patching import Schedule


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
