"""Our tasks' earlier names: sweep files may use them, and old results are found under them."""

from __future__ import annotations

import re

_OLD = re.compile(r"(passkey|multikey|vartrack)_(\d+)")
_NEW = re.compile(r"recall_(passkey|multikey|vartrack)_(\d+)")


def current_name(task: str) -> str:
    """``recall_passkey_512`` for its earlier name ``passkey_512``; other names as they are."""
    return _renamed(_OLD, task, r"recall_\1_\2")


def recorded_name(task: str) -> str:
    """The name by which cells are identified: the earlier one, so that old runs can go on."""
    return _renamed(_NEW, task, r"\1_\2")


def _renamed(pattern: re.Pattern[str], task: str, name: str) -> str:
    found = pattern.fullmatch(task)
    return task if found is None else found.expand(name)
