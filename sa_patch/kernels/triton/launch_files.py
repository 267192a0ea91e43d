"""Launch parameters that were measured on a card, as a file for each kind of card.

Two folders are looked into: the user's cache, which ``sa-patch bench --tune`` writes
(`benchmark.tuning`), and ``kernels/triton/launches``, which is shipped. A table that is torn or was
made with another version of Triton is ignored, with one sentence.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

KIND, SCHEMA = "sa_patch launch parameters", 1
SHIPPED = Path(__file__).parent / "launches"
Table = dict[str, dict[str, Any]]
"""The fields of a config by ``USE DTYPE_BYTES HEAD_DIM``, such as ``ring 2 128``."""


def cached_folder() -> Path:
    """The user's own tables: below ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "sa_patch" / "launches"


def file_name(device: str, capability: tuple[int, int]) -> str:
    """Of the table for a card, such as ``nvidia-h200-9.0.json``."""
    slug = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug}-{capability[0]}.{capability[1]}.json"


def triton_version() -> str:
    """The version installed; empty where there is none."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@lru_cache(maxsize=16)
def measured_launches(device: str, capability: tuple[int, int]) -> Table:
    """What was measured on this kind of card: shipped entries, and the user's before them."""
    name = file_name(device, capability)
    found: Table = {}
    for folder in (SHIPPED, cached_folder()):
        if (path := folder / name).exists():
            found |= read_table(path)
    return found


def read_table(path: Path) -> Table:
    """A table; empty, with one sentence, for one that cannot be trusted."""
    try:
        content = json.loads(path.read_text())
        if (content["kind"], content["schema"]) != (KIND, SCHEMA):
            raise ValueError("it is no table of this version")
        entries: Table = content["entries"]
        if not all(_is_entry(entry) for entry in entries.values()):
            raise ValueError("an entry is no set of launch parameters")
        made_with = content["triton"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"launch parameters in {path} are ignored: they cannot be read ({error})", stacklevel=2
        )
        return {}
    if made_with != triton_version():
        warnings.warn(
            f"launch parameters in {path} are ignored: they were measured with Triton "
            f"{made_with}, and {triton_version() or 'none'} is installed",
            stacklevel=2,
        )
        return {}
    return entries


def _is_entry(entry: Any) -> bool:
    """Whether all of it is whole numbers from 1 on, on/off or launches of such."""
    if isinstance(entry, dict) and entry:
        return all(_is_entry(value) for value in entry.values())
    return isinstance(entry, (bool, int)) and (isinstance(entry, bool) or entry >= 1)
